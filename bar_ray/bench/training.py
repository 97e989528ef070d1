"""One optimizer step of every stage, against Hugging Face's FlexOlmo with the same freezing and
against training everything and masking what is frozen, as the published code does.

All sides have the same weights, the same tokens and torch's AdamW over what they train, without an
engine around them. Hugging Face's grouped experts are one Parameter: its anchor cannot be frozen,
so the same freezing there means that the anchor's gradient is formed and thrown away.
"""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, FlexOlmoConfig, FlexOlmoForCausalLM

from bar_ray.bench import rounds
from bar_ray.data.batches import MicroBatch
from bar_ray.model import freeze, fused, tensors
from bar_ray.recipe import Learn, Run, Stage
from bar_ray.train.loss import token_logprobs
from kernels import device

SIZES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 128},
    "width 512": {"hidden_size": 512, "intermediate_size": 1376, "vocab_size": 8192},
}
STAGES = {
    "midtrain": Learn(expert=1, router=1),
    "sft": Learn(expert=1, router=1, embedding=1, lm_head=1),
    "rlvr": Learn(expert=1, router=1, embedding=1, lm_head=1, attention=1, norm=1),
    "router": Learn(router=1),
}
ROWS, LENGTH, MERGED = 8, 256, 5  # MERGED: experts of the model whose router learns

Step = Callable[[], None]


def dtype_here() -> torch.dtype:
    """bfloat16 where the CPU has it: elsewhere the products would be all that is measured."""
    return torch.bfloat16 if device.multiplies_bfloat16() else torch.float32


def run(num_rounds: int = 7) -> list[rounds.Row]:
    found, dtype = [], dtype_here()
    with tempfile.TemporaryDirectory() as place:
        for size, shape in SIZES.items():
            for stage, learn in STAGES.items():
                folder = Path(place, size, str(_experts(stage)))
                if not folder.exists():
                    _write(folder, shape, _experts(stage))
                sides = {
                    "ours": ours(folder, learn, dtype),
                    "HF grouped_mm, same freezing": grouped(folder, learn, dtype, masks=False),
                    "HF, train everything, then mask": grouped(folder, learn, dtype, masks=True),
                }
                what = f"{stage} step, {size}, {str(dtype).removeprefix('torch.')}"
                found.append(rounds.measure(what, sides, num_rounds))
    return found


def _experts(stage: str) -> int:
    return MERGED if stage == "router" else 2


def _write(folder: Path, shape: dict[str, int], experts: int) -> None:
    torch.manual_seed(0)
    config = FlexOlmoConfig(
        **shape,
        num_hidden_layers=4,
        num_attention_heads=shape["hidden_size"] // 32,
        num_key_value_heads=shape["hidden_size"] // 32,
        num_experts=experts,
        num_experts_per_tok=experts,
        max_position_embeddings=LENGTH,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    FlexOlmoForCausalLM(config).save_pretrained(folder)


def batch(vocab: int) -> MicroBatch:
    tokens = torch.randint(1, vocab, (ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(LENGTH).expand(ROWS, -1)
    return MicroBatch(tokens, (positions > 0).long(), positions)


def ours(folder: Path, learn: Learn, dtype: torch.dtype) -> Step:
    model = fused.load(folder, dtype)
    freeze.apply(model, learn)
    optimizer = _adamw([p for p in model.parameters() if p.requires_grad])
    micro = batch(model.config.vocab_size)

    def step() -> None:
        loss = -token_logprobs(model, micro)[0].mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def grouped(folder: Path, learn: Learn, dtype: torch.dtype, masks: bool) -> Step:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model.set_experts_implementation("grouped_mm")
    kept = {name: _kept(name, p, learn) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(masks or bool(kept[name].any()))
    learning = {n: p for n, p in model.named_parameters() if p.requires_grad}
    frozen = {n: ~kept[n] for n in learning if not kept[n].all()}
    optimizer = _adamw(list(learning.values()))
    micro = batch(model.config.vocab_size)

    def step() -> None:
        model(input_ids=micro.tokens_MS, labels=micro.tokens_MS, use_cache=False).loss.backward()
        for name, mask in frozen.items():
            gradient = learning[name].grad
            gradient.masked_fill_(mask.view(-1, *[1] * (gradient.dim() - 1)), 0.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def _kept(name: str, parameter: torch.Tensor, learn: Learn) -> torch.Tensor:
    """What learns of a parameter: along its experts where it has them, else as a whole [1]."""
    if ".mlp." not in name:
        return torch.tensor([getattr(learn, tensors.role_of(name)) > 0])
    role = "router" if ".gate." in name else "expert"
    kept = torch.full((len(parameter),), getattr(learn, role) > 0)
    if parameter.shape[0] == 2:  # a branch: the anchor and its row stay as they are
        kept[0] = learn.anchor > 0
    return kept


def _adamw(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)


TRAINER_STEPS = 4


def trainers(num_rounds: int = 3) -> list[rounds.Row]:
    """SFT of the width-512 model by whole trainers: our engine, and TRL's SFTTrainer."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place, "model")
        _write(folder, SIZES["width 512"], 2)
        sides = {"ours": _our_trainer(folder, place), "TRL SFTTrainer": _trl_trainer(folder, place)}
        return [rounds.measure("SFT, whole trainers, a step", sides, num_rounds)]


def _our_trainer(folder: Path, place: str) -> Callable[[], float]:
    from bar_ray.train.engine import Engine
    from bar_ray.train.loss import language_model_loss

    os.environ.setdefault("LOCAL_RANK", "0")  # Ray Train sets it for its workers
    store = f"file://{place}/store"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    name = str(dtype_here()).removeprefix("torch.")
    stage = Stage(lr=1e-4, learn=STAGES["sft"], dtype=name, run=Run(micro_batch=ROWS))
    model = fused.load(folder, dtype_here())
    engine = Engine(model, stage, num_steps=10**6)
    micro = batch(model.config.vocab_size)
    counts = int(micro.loss_MS.sum()), micro.tokens_MS.numel()

    def train() -> float:
        started = time.perf_counter()
        for _ in range(TRAINER_STEPS):
            engine.forward_backward([micro], lambda m: language_model_loss(model, m, *counts, 0.0))
            engine.optim_step()
        return (time.perf_counter() - started) / TRAINER_STEPS

    return train


def _trl_trainer(folder: Path, place: str) -> Callable[[], float]:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype_here())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(_kept(name, parameter, STAGES["sft"]).any()))
    rows = batch(model.config.vocab_size).tokens_MS.tolist() * (TRAINER_STEPS + 1)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=_nothing(), pad_token="[PAD]")
    arguments = SFTConfig(
        output_dir=f"{place}/trl",
        per_device_train_batch_size=ROWS,
        max_steps=TRAINER_STEPS + 1,
        learning_rate=1e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        bf16=False,  # the model has its type already
        use_cpu=True,
        gradient_checkpointing=False,
        max_length=LENGTH,
        logging_strategy="no",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )

    class Clock(TrainerCallback):
        def __init__(self) -> None:
            self.times: list[float] = []

        def on_step_end(self, *_, **__) -> None:
            self.times.append(time.perf_counter())

    def train() -> float:
        clock = Clock()
        trainer = SFTTrainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            processing_class=tokenizer,
            callbacks=[clock],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return (clock.times[-1] - clock.times[0]) / TRAINER_STEPS

    return train


def _nothing() -> Tokenizer:
    """A tokenizer with a padding token alone: rows are tokens already."""
    return Tokenizer(WordLevel({"[PAD]": 0}, unk_token="[PAD]"))
