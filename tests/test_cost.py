"""The cost model: published sizes, and FLOPs as torch counts them."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from bar_ray import cost
from bar_ray.model import experts, tensors
from bar_ray.recipe import DENSE, Learn, Run

OLMO2_7B = cost.Shape(32, 4096, 32, 32, 128, 11008, 100352)
TWO = replace(OLMO2_7B, experts=2, active=2)
FIVE = replace(OLMO2_7B, experts=5, active=5)
MIDTRAIN = Learn(expert=1, router=1)
SFT = replace(MIDTRAIN, embedding=1, lm_head=1)
RLVR = replace(SFT, attention=1, norm=1)
ROUTER = Learn(router=1, anchor=0)


@pytest.mark.parametrize(
    ("shape", "learn", "gigaflops"),
    [
        (OLMO2_7B, DENSE, (14.85, 16.46, 13.77)),
        (TWO, MIDTRAIN, (23.50, 24.54, 8.66)),
        (TWO, SFT, (23.50, 25.12, 9.48)),
        (TWO, RLVR, (23.50, 25.12, 13.77)),
        (FIVE, ROUTER, (49.48, 49.97, 0.0)),
        (replace(FIVE, active=4), ROUTER, (40.82, 41.49, 0.0)),
    ],
)
def test_flops_of_the_stages_at_7b(shape: cost.Shape, learn: Learn, gigaflops: tuple) -> None:
    """Worked out by hand, term by term, for 4,096 tokens."""
    found = shape.flops(learn, 4096)
    counted = found.forward, found.input_gradient, found.weight_gradient
    assert [n / 1e9 for n in counted] == pytest.approx(gigaflops, rel=2e-3, abs=0.01)


def tiny(folder: Path, kind: str, **sizes: int) -> torch.nn.Module:
    fixed = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "vocab_size": 50}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = AutoConfig.for_model(kind, **fixed, **heads, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    model = experts.load(folder, torch.float32)
    model.set_attn_implementation("eager")  # torch counts its products as they are
    return model


@pytest.mark.parametrize(
    ("kind", "learn"),
    [
        ("olmo2", DENSE),
        ("olmo2", Learn(lm_head=1)),
        ("olmo2", Learn(norm=1)),
        ("olmo2", Learn(attention=1)),
        ("flex_olmo", MIDTRAIN),
        ("flex_olmo", SFT),
        ("flex_olmo", RLVR),
        ("flex_olmo", ROUTER),
    ],
)
def test_flops_are_what_torch_counts(kind: str, learn: Learn, tmp_path: Path) -> None:
    three = {"num_experts": 3, "num_experts_per_tok": 3} if kind == "flex_olmo" else {}
    model = tiny(tmp_path, kind, **three)
    shape = cost.Shape.of(model.config.to_dict())
    for name, parameter in model.named_parameters():
        role = tensors.role_of(name)
        parameter.requires_grad_(getattr(learn, role) > 0)
    tokens = torch.randint(0, 50, (2, 16))
    with FlopCounterMode(display=False) as counter:
        loss = model(tokens).logits.square().mean()
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    expected = shape.flops(learn, 16)
    scores = 2 * 16 * shape.heads * shape.head_dim * shape.layers
    assert forward / 32 == expected.forward + scores, "eager attention computes the whole square"
    layers = shape.layers - (0 if learn.embedding or learn.attention else 1)
    backward = expected.input_gradient + expected.weight_gradient
    if expected.input_gradient:  # twice the square without recomputation, not 2.5 of its half
        backward += (2 * 2 - cost.FLASH_BACKWARD) * scores * layers / shape.layers
    assert counter.get_total_flops() / 32 == pytest.approx(backward)


@pytest.mark.parametrize(
    ("shape", "learn", "gigabytes"),
    [(TWO, MIDTRAIN, 83.9), (TWO, SFT, 95.4), (TWO, RLVR, 125.4), (FIVE, ROUTER, 49.2)],
)
def test_memory_of_the_stages_at_7b(shape: cost.Shape, learn: Learn, gigabytes: float) -> None:
    """Weights, gradients and Adam with fp32 copies, on one worker; worked out by hand."""
    found = shape.memory(learn, Run(micro_batch=1), 4096, "bfloat16")
    assert (found.total - found.activations) / 1e9 == pytest.approx(gigabytes, rel=2e-3)


@pytest.mark.parametrize(
    ("shape", "learn", "megabytes"),
    [(TWO, MIDTRAIN, 5.14), (TWO, RLVR, 5.45), (FIVE, ROUTER, 9.36)],
)
def test_activations_of_the_stages_at_7b(shape: cost.Shape, learn: Learn, megabytes: float) -> None:
    assert 2 * shape.activations(learn) / 1e6 == pytest.approx(megabytes, rel=5e-3)


def test_memory_is_parted_among_workers() -> None:
    one = TWO.memory(RLVR, Run(), 4096, "bfloat16", workers=1)
    for stage, parted in ((1, 1), (2, 2), (3, 3)):
        many = TWO.memory(RLVR, Run(zero_stage=stage), 4096, "bfloat16", workers=4)
        names = ("optimizer", "gradients", "weights")
        ratios = [getattr(one, name) / getattr(many, name) for name in names]
        assert ratios == [4.0] * parted + [1.0] * (3 - parted)


def test_weights_and_keys_are_those_of_the_model(tmp_path: Path) -> None:
    model = tiny(tmp_path, "flex_olmo", num_experts=3, num_experts_per_tok=3)
    found: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        role = tensors.role_of(name)
        role = "router" if ".gate.rows." in name else role
        found[role] = found.get(role, 0) + parameter.numel()
    assert cost.Shape.of(model.config.to_dict()).weights() == found
    assert OLMO2_7B.kv_cache(1) == pytest.approx(0.524e6, rel=1e-3)


def test_a_device_is_known_by_its_most_exact_name() -> None:
    assert cost.peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert cost.peak_flops("NVIDIA H100 PCIe") == 756e12
    assert cost.peak_flops("") == cost.peak_flops("GeForce") == 0.0


KEPT = """
import sys, torch
from bar_ray import cost
from bar_ray.data.batches import MicroBatch
from bar_ray.model import freeze, fused
from bar_ray.recipe import Learn
from bar_ray.train.loss import token_logprobs

for stage in (Learn(expert=1, router=1), Learn(expert=1, router=1, attention=1, norm=1)):
    model = fused.load(sys.argv[1], torch.bfloat16)
    freeze.apply(model, stage)
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    positions = torch.arange(64).expand(1, -1)
    batch = MicroBatch(torch.ones(1, 64, dtype=torch.long), (positions > 0).long(), positions)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        token_logprobs(model, batch)
    expected = 2 * 64 * cost.Shape.of(model.config.to_dict()).activations(stage)
    print(sum(kept.values()) / expected)
"""


def test_activations_are_what_the_kernels_keep(tmp_path: Path) -> None:
    """Counted in a process whose Triton kernels are interpreted."""
    tiny(tmp_path, "flex_olmo", num_experts=2, num_experts_per_tok=2)
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    command = [sys.executable, "-c", KEPT, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == 2 and all(0.95 < ratio < 1.15 for ratio in ratios), ratios
