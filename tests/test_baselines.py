"""Dense models made one, or the experts of one MoE; TIES against mergekit's."""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM

from bar_ray.baselines import dense, lora
from bar_ray.model import average, freeze
from bar_ray.model.tensors import Checkpoint
from bar_ray.recipe import Learn, Merge
from bar_ray.tiny.model import tiny_config
from bar_ray.tiny.tokenizer import build_tokenizer

TOKENS = torch.arange(5, 30)[None]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dense base and two models that moved away from it."""
    found = {}
    for number, name in enumerate(("base", "model:one", "model:two")):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(tiny_config(), dtype=torch.float32)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters() if number else ():
                parameter.add_(torch.randn_like(parameter) * 0.05)
        found[name] = tmp_path_factory.mktemp("dense")
        model.save_pretrained(found[name])
        build_tokenizer().save_pretrained(found[name])
    return found


class Run:
    """What a verb is given, over folders."""

    def __init__(self, output: Path) -> None:
        self.folder = output

    @staticmethod
    def fetch(folder: Path) -> str:
        return str(folder)

    @contextlib.contextmanager
    def output(self, step: Any, info: Any = None) -> Iterator[str]:
        yield str(self.folder)


def logits(folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits


def test_dense_models_average(folders: dict[str, Path], tmp_path: Path) -> None:
    step = SimpleNamespace(inputs=folders, settings=Merge(include_base=False))
    dense.merge(step, Run(tmp_path))
    made, one, two = map(Checkpoint, (tmp_path, folders["model:one"], folders["model:two"]))
    for name in made.names:
        assert torch.allclose(made[name], (one[name] + two[name]) / 2, atol=1e-7), name
    assert logits(tmp_path).isfinite().all()


def test_btx_keeps_ffns_apart_and_merges_the_rest(folders: dict[str, Path], tmp_path: Path) -> None:
    settings = {"merge": Merge(rule="one", expert="two"), "router_std": 0.02, "seed": 0}
    dense.btx(SimpleNamespace(inputs=folders, settings=settings), Run(tmp_path))
    made = Checkpoint(tmp_path)
    assert made.config["num_experts"] == made.config["num_experts_per_tok"] == 3
    for slot, folder in enumerate(folders.values()):
        of_dense = Checkpoint(folder)["model.layers.1.mlp.up_proj.weight"]
        assert torch.equal(made[f"model.layers.1.mlp.experts.{slot}.up_proj.weight"], of_dense)
    shared = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(made[shared], Checkpoint(folders["model:two"])[shared])


def test_btx_of_one_model_is_that_model(folders: dict[str, Path], tmp_path: Path) -> None:
    same = dict.fromkeys(folders, folders["model:one"])
    settings = {"merge": Merge(), "router_std": 0.5, "seed": 0}
    dense.btx(SimpleNamespace(inputs=same, settings=settings), Run(tmp_path))
    assert (logits(tmp_path) - logits(folders["model:one"])).abs().max() < 1e-4


def test_ties_agrees_with_mergekit(folders: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("mergekit", reason="the `bench` extra is not installed")
    density, scale = 0.3, 0.7
    models = [folders["model:one"], folders["model:two"]]
    config = {
        **{"merge_method": "ties", "base_model": str(folders["base"]), "dtype": "float32"},
        "parameters": {"density": density, "normalize": True, "lambda": scale},
        "models": [{"model": str(m), "parameters": {"weight": 1.0}} for m in models],
    }
    (tmp_path / "ties.yaml").write_text(yaml.safe_dump(config))
    program = Path(sys.executable).with_name("mergekit-yaml")
    command = [program, str(tmp_path / "ties.yaml"), str(tmp_path / "merged")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    base, theirs = Checkpoint(folders["base"]), Checkpoint(tmp_path / "merged")
    deltas = [Checkpoint(model) for model in models]
    for name in base.names:
        ours = average.ties(base[name], [model[name] for model in deltas], density, scale)
        assert torch.allclose(ours, theirs[name], atol=1e-6), name
        assert not torch.equal(ours, base[name])


def test_an_adapter_merged_in_is_the_model_with_the_adapter(folders: dict[str, Path]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    model = inject_adapter_in_model(config, model)
    groups = freeze.apply(model, Learn(embedding=0.5))
    assert {group["role"]: group["scale"] for group in groups} == {"adapter": 1.0, "embedding": 0.5}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        wanted = model(TOKENS).logits
        plain = AutoModelForCausalLM.from_pretrained(folders["base"], dtype=torch.float32)
        plain.load_state_dict(lora.merged(dict(model.named_parameters()), scale=8 / 4))
        assert (plain(TOKENS).logits - wanted).abs().max() < 1e-4
        assert (logits(folders["base"]) - wanted).abs().max() > 1e-2


def test_the_classifier_tells_apart_what_can_be_told_apart() -> None:
    torch.manual_seed(0)
    labels = torch.tensor([0] * 200 + [1] * 20 + [2] * 50)
    centres = torch.randn(3, 16) * 2
    features = 100 + 7 * (centres[labels] + torch.randn(len(labels), 16) * 0.3)
    right = lora.classifier(features, labels, 3)(features).argmax(-1) == labels
    assert right.float().mean() > 0.98


def test_a_routed_evaluation_takes_each_answer_from_the_chosen_adapter(tmp_path: Path) -> None:
    def evaluated(name: str, score: float) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        rows = [
            {"category": "math", "id": i, "score": score, "outcome": "right" if score else "wrong"}
            for i in ("a", "b", "c", "d")
        ]
        (folder / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return folder

    inputs = {"router": tmp_path, "scores:math": evaluated("math", 1.0)}
    inputs["scores:general"] = evaluated("general", 0.0)
    choices = {"math": {"a": "math", "b": "general", "c": "math", "d": "math"}}
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    (tmp_path / "out").mkdir()
    lora.evaluate(SimpleNamespace(inputs=inputs), Run(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert found["scores"]["math"] == 75 and found["outcomes"]["math"] == {"right": 3, "wrong": 1}
