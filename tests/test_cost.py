"""The cost model: published sizes, and FLOPs as torch counts them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from bar_ray import cost
from bar_ray.model import experts, tensors
from bar_ray.recipe import DENSE, Learn

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
