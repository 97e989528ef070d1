"""Olmo 2, Llama and Qwen 3: branching, training blocks, merging and files of each family."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from bar_ray import families
from bar_ray.cost import Shape
from bar_ray.families import COUNTS, FAMILIES, Family
from bar_ray.merge import merge
from bar_ray.model import adopt, branch, experts, freeze, fused, tensors
from bar_ray.model.tensors import Checkpoint
from bar_ray.recipe import SHARED, Learn, Merge
from bar_ray.types import UserError

TOKENS = torch.arange(60).reshape(2, 30)
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-4,
    "rope_parameters": {"rope_type": "default", "rope_theta": 20_000.0},
}


@pytest.fixture(params=FAMILIES, ids=lambda family: family.dense)
def family(request: pytest.FixtureRequest) -> Family:
    return request.param


def dense(family: Family, folder: Path, seed: int, **changes: object) -> Checkpoint:
    """A random dense model whose heads are wider than width / heads, where the family can."""
    torch.manual_seed(seed)
    head = {} if family.dense == "olmo2" else {"head_dim": 16}
    config = AutoConfig.for_model(family.dense, **{**SIZES, **head, **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text("{}")
    return Checkpoint(folder)


@pytest.fixture
def post(family: Family, tmp_path: Path) -> Checkpoint:
    return dense(family, tmp_path / "post", 0)


@pytest.fixture
def branched(family: Family, tmp_path: Path, post: Checkpoint) -> Checkpoint:
    pre = dense(family, tmp_path / "pre", 1)
    branch.branch(post, pre, str(tmp_path / "branch"), std=0.5, seed=0)
    return Checkpoint(tmp_path / "branch")


def trained(model: Checkpoint, folder: Path, seed: int) -> Checkpoint:
    """A branch that moved everywhere but in its anchor."""
    generator = torch.Generator().manual_seed(seed)

    def moved(name: str) -> torch.Tensor:
        noise = torch.randn(model.spec(name).shape, generator=generator)
        return model[name] + (0 if tensors.role_of(name) == "anchor" else 0.1) * noise

    specs = {name: model.spec(name) for name in model.names}
    tensors.write(folder, model.config, specs, moved, model.folder)
    return Checkpoint(folder)


def logits(folder: Path) -> torch.Tensor:
    """Of a folder that must hold exactly what Hugging Face expects."""
    model, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model(TOKENS).logits.detach()


def test_an_untrained_branch_is_the_dense_model(
    family: Family, post: Checkpoint, tmp_path: Path
) -> None:
    branch.branch(post, post, str(tmp_path / "branch"), std=0.5, seed=0)
    assert (logits(tmp_path / "branch") - logits(post.folder)).abs().max() < 1e-4
    config = json.loads((tmp_path / "branch" / "config.json").read_text())
    assert config["architectures"] == [family.moe_class] and config["model_type"] == family.moe
    assert config["rope_parameters"]["rope_theta"] == 20_000.0 and config["rms_norm_eps"] == 1e-4
    assert [config.get(name) for name in COUNTS].count(2) == 1, "one key, or one silently wins"


def test_names_in_files_are_those_of_hugging_face(
    family: Family, branched: Checkpoint, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(branched.folder, dtype=torch.float32)
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (stored_names(folder) for folder in (branched.folder, tmp_path / "theirs"))
    assert ours == theirs
    assert {family.canonical(name) for name in theirs} == {*branched.names}
    assert {family.disk(name) for name in branched.names} == theirs
    assert all(family.canonical(name) == name for name in branched.names)
    roles = {tensors.role_of(name) for name in branched.names}
    assert roles == {*SHARED, "anchor", "expert", "router"}
    far = "model.layers.31.mlp.experts.12.down_proj.weight"
    assert family.canonical(family.disk(far)) == far


def stored_names(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        return {*file.keys()}


def test_a_model_in_training_is_the_one_on_disk(branched: Checkpoint, tmp_path: Path) -> None:
    model = fused.load(branched.folder, torch.float32)
    assert (model(TOKENS).logits - logits(branched.folder)).abs().max() < 1e-4
    experts.save(model, tmp_path / "saved", branched.folder)
    again = Checkpoint(tmp_path / "saved")
    assert again.names == branched.names and again.config == branched.config
    assert all(torch.equal(again[name], branched[name]) for name in again.names)


def test_the_anchor_stays_frozen(branched: Checkpoint) -> None:
    model = fused.load(branched.folder, torch.float32)
    freeze.apply(model, Learn(expert=1, router=1))
    model(TOKENS).logits.square().mean().backward()
    roles = {tensors.role_of(n) for n, p in model.named_parameters() if p.grad is not None}
    assert roles == {"expert", "router"}


@pytest.mark.parametrize("top_k", [3, 2])
def test_merged_models_agree_with_hugging_face(
    family: Family, branched: Checkpoint, tmp_path: Path, top_k: int
) -> None:
    """With fewer than all experts active, gates sum to one where the family says so."""
    models = {name: trained(branched, tmp_path / name, seed) for seed, name in enumerate("ab")}
    merge(branched, models, str(tmp_path / "merged"), Merge())
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert [config.get(name) for name in COUNTS].count(3) == 1
    config["num_experts_per_tok"] = top_k
    (tmp_path / "merged" / "config.json").write_text(json.dumps(config))
    merged = Checkpoint(tmp_path / "merged")
    for slot, name in enumerate("ab", start=1):
        place = "model.layers.1.mlp.experts.{}.down_proj.weight"
        assert torch.equal(merged[place.format(slot)], models[name][place.format(1)])
    expected = logits(merged.folder)
    for kernels in ("auto", "reference"):
        model = fused.load(merged.folder, torch.float32, kernels=kernels)
        assert (model(TOKENS).logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_renormalised_gates_sum_to_one() -> None:
    given = torch.tensor([[3.0, 1.0, 2.0]])
    plain = experts.gate_weights(given, 2, renormalise=False)
    renormalised = experts.gate_weights(given, 2, renormalise=True)
    assert plain.sum() < 0.95 and renormalised.sum() == pytest.approx(1)
    assert torch.allclose(renormalised, plain / plain.sum())


def test_families_are_not_mixed(tmp_path: Path) -> None:
    branches = []
    for family in FAMILIES:
        model = dense(family, tmp_path / family.dense, 0)
        branch.branch(model, model, str(tmp_path / family.moe), std=0.1, seed=0)
        branches.append(Checkpoint(tmp_path / family.moe))
    for one, other in pairwise(branches):
        with pytest.raises(UserError, match="is a "):
            merge(one, {"a": other}, str(tmp_path / "merged"), Merge())
    with pytest.raises(UserError, match="olmo2, llama, qwen3"):
        families.of_dense({"model_type": "gpt2"}, "there")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("llama", {"attention_bias": True}),
        ("llama", {"mlp_bias": True}),
        ("llama", {"hidden_act": "gelu"}),
        ("qwen3", {"use_sliding_window": True}),
        ("qwen3", {"attention_bias": True}),
    ],
)
def test_what_a_mixture_cannot_compute_is_refused(name: str, setting: dict) -> None:
    family = next(each for each in FAMILIES if each.dense == name)
    [key] = setting
    with pytest.raises(UserError, match=f"there has {key}"):
        family.refuse({"model_type": name, **setting}, "there")
    family.refuse({"model_type": name, "hidden_act": "silu"}, "there")


def test_tied_embeddings_are_untied_on_import(family: Family, tmp_path: Path) -> None:
    tied = dense(family, tmp_path / "tied", 0, tie_word_embeddings=True)
    expected = logits(tied.folder)
    with pytest.raises(UserError, match="untie"):
        branch.branch(tied, tied, str(tmp_path / "no"), std=0.1, seed=0)
    adopt.untie(tied)
    untied = Checkpoint(tied.folder)
    assert torch.equal(untied["lm_head.weight"], untied["model.embed_tokens.weight"])
    assert torch.equal(logits(untied.folder), expected)
    branch.branch(untied, untied, str(tmp_path / "branch"), std=0.1, seed=0)
    assert (logits(tmp_path / "branch") - expected).abs().max() < 1e-4


def test_the_cost_model_knows_every_weight(family: Family, branched: Checkpoint) -> None:
    counted = sum(Shape.of(branched.config).weights().values())
    there = sum(torch.Size(branched.spec(name).shape).numel() for name in branched.names)
    assert counted == there
