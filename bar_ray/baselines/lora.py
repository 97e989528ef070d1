"""A LoRA adapter per domain and a router over adapters: what a team would set up without MoE.

`lora` trains an adapter on the post-trained model (peft) and stores the model with it merged in,
beside the adapter itself. `adapter_router` reads from a prompt which adapter shall answer: a linear
classifier on the base's mean last hidden state, trained on the router's sample. `routed` puts the
evaluation of the whole together from those of the models: each prompt's answer is the one of the
model that the router picks, as every prompt is answered by one adapter alone.
"""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model

from bar_ray.data import chat, formats
from bar_ray.evaluate.items import test_items
from bar_ray.evaluate.run import score, write
from bar_ray.graph import inputs_of
from bar_ray.model import tensors
from bar_ray.model.tensors import Checkpoint
from bar_ray.recipe import Lora
from bar_ray.stages import lm

A, B = ".lora_A.default.weight", ".lora_B.default.weight"
ROUTER_STEPS, ROUTER_LR, ROUTER_DECAY = 300, 0.05, 1e-3
MAX_PROMPT = 512


class LoraWorker(lm.LmWorker):
    """A language-model stage whose attention and FFN learn through adapters.

    Settings: also `lora`. Embeddings and LM head learn as the stage's freeze table says.
    """

    def load_model(self) -> Any:
        torch.manual_seed(self.step.settings["seed"])  # of the adapters' first weights
        return inject_adapter_in_model(self.config, super().load_model())

    @property
    def config(self) -> LoraConfig:
        settings: Lora = self.step.settings["lora"]
        return LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )

    def on_disk(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        settings: Lora = self.step.settings["lora"]
        adapter = {n: w for n, w in weights.items() if n.endswith((A, B))}
        self.adapter = {
            f"base_model.model.{n.replace('.default', '')}": w for n, w in adapter.items()
        }
        return merged(weights, settings.alpha / settings.rank)

    def finish_output(self, folder: str) -> None:
        self.config.save_pretrained(Path(folder, "adapter"))
        tensors.save(Path(folder, "adapter", "adapter_model.safetensors"), self.adapter)


def merged(weights: Mapping[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """Base weights by their plain names, with scale * B A added where there is an adapter."""
    found = {}
    for name, value in weights.items():
        if name.endswith((A, B)):
            continue
        plain, _, rest = name.partition(".base_layer")
        if rest:
            delta = weights[plain + B].float() @ weights[plain + A].float()
            value = (value.float() + scale * delta).to(value.dtype)
        found[plain + rest] = value
    return found


def train_router(step: Any, run: Any) -> None:
    """Inputs: `base`, `sample`; data: test files by category; settings: `adapter` of each source.

    Output: choices.json, the adapter's name by category and test item.
    """
    folder, sample = run.fetch(step.inputs["base"]), run.fetch(step.inputs["sample"])
    tokenizer, reader = chat.load_tokenizer(folder), Reader(folder)
    names = sorted(set(step.settings["adapter"].values()))
    prompts, labels = [], []
    for source, adapter in step.settings["adapter"].items():
        for row in formats.read_rows(str(Path(sample, f"{source}.jsonl")), "messages"):
            ids, mask = chat.conversation(tokenizer, row)
            prompts.append(ids[: mask.index(1)])
            labels.append(names.index(adapter))
    torch.manual_seed(step.settings["seed"])
    classify = classifier(reader(prompts), torch.tensor(labels), len(names))
    choices = {}
    for category in step.data:
        items = test_items(folder, category, run.locate(step, category), 0)
        picked = classify(reader([item["prompt"] for item in items])).argmax(-1).tolist()
        choices[category] = {i["id"]: names[n] for i, n in zip(items, picked, strict=True)}
    with run.output(step) as output:
        Path(output, "choices.json").write_text(json.dumps(choices, indent=1))


class Reader:
    """Prompts to features: the mean of the last hidden states."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel

        config = Checkpoint(folder).config
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model = AutoModel.from_pretrained(folder, dtype=config["dtype"]).to(device).eval()

    @torch.no_grad()
    def __call__(self, prompts: Iterable[list[int]]) -> torch.Tensor:
        rows = []
        for prompt in prompts:
            ids = torch.tensor([prompt[-MAX_PROMPT:]], device=self.model.device)
            rows.append(self.model(ids, use_cache=False).last_hidden_state[0].float().mean(0))
        return torch.stack(rows).cpu()


def classifier(features: torch.Tensor, labels: torch.Tensor, classes: int) -> torch.nn.Module:
    """Softmax regression on standardised features, classes weighted equally."""
    mean, std = features.mean(0), features.std(0) + 1e-6
    linear = torch.nn.Linear(features.shape[1], classes)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=ROUTER_LR, weight_decay=ROUTER_DECAY)
    weight = 1 / torch.bincount(labels, minlength=classes).clamp(min=1)
    inputs = (features - mean) / std
    for _ in range(ROUTER_STEPS):
        optimizer.zero_grad()
        F.cross_entropy(linear(inputs), labels, weight=weight).backward()
        optimizer.step()
    with torch.no_grad():  # the standardisation becomes part of the layer
        linear.weight /= std
        linear.bias -= linear.weight @ mean
    return linear


def evaluate(step: Any, run: Any) -> None:
    """Inputs: `router`, an evaluation `scores:NAME` per adapter. Output as of `evaluate`."""
    choices = json.loads(Path(run.fetch(step.inputs["router"]), "choices.json").read_text())
    samples = {}
    for name, evaluation in inputs_of(step, "scores").items():
        lines = Path(run.fetch(evaluation), "samples.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        samples[name] = {(row["category"], row["id"]): row for row in rows}
    [any_answers, *_] = samples.values()
    # The harness's prompts are its own: the router has not seen them.
    known = [(category, i) for category, i in any_answers if category in choices]
    chosen = [samples[choices[category][i]][category, i] for category, i in known]
    write(score(chosen), chosen, step, run)
