"""The 7B recipe without weights: every tensor built, split, sharded, merged and frozen by shape.

Files are holes of the right size, and models are on the meta device.
"""

import json
import os
from collections import Counter

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bar_ray import config
from bar_ray.cost import Shape
from bar_ray.merge import merge, with_rows
from bar_ray.model import branch, experts, freeze, tensors
from bar_ray.model.tensors import Checkpoint, Spec
from bar_ray.recipe import STAGES, Merge
from kernels import average

OLMO2_7B = {  # of BAR-7B, the dense model that the published one starts from
    "architectures": ["Olmo2ForCausalLM"],
    "attention_bias": False,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "max_position_embeddings": 4096,
    "model_type": "olmo2",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "rms_norm_eps": 1e-06,
    "rope_theta": 500000,
    "tie_word_embeddings": False,
    "vocab_size": 100278,
}
DOMAINS = ("math", "code", "tool_use", "safety")
SMALL = 2**20  # headers, norms and routers are written, all else is a hole


@pytest.fixture(scope="module")
def holes() -> None:
    """Bytes of large tensors are skipped instead of written."""
    written = average.write

    def write(descriptor: int, content: memoryview, offset: int) -> None:
        if len(content) < SMALL:
            written(descriptor, content, offset)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(average, "reserve", os.truncate)
        patch.setattr(average, "write", write)
        patch.setattr(average, "copy", lambda region, part: None)
        patch.setattr(average, "mean", lambda regions, dtype, part: None)
        yield


@pytest.fixture(scope="module")
def models(holes: None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """What the verbs make of a dense 7B model, by verb."""
    root = tmp_path_factory.mktemp("7b")
    given = AutoConfig.for_model(**OLMO2_7B)
    with torch.device("meta"):
        dense = AutoModelForCausalLM.from_config(given, dtype=torch.bfloat16)
    specs = tensors.specs_of(dict(dense.named_parameters()))
    empty = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in specs.items()}
    tensors.write(root / "dense", given.to_dict(), specs, empty.__getitem__)
    (root / "dense" / "tokenizer_config.json").write_text("{}")
    found = {"dense": Checkpoint(root / "dense")}
    branch.branch(found["dense"], found["dense"], str(root / "branch"), std=0.02, seed=0)
    found["branch"] = Checkpoint(root / "branch")
    for name, kept in (("merged", DOMAINS), ("some", DOMAINS[:2])):
        merge(found["branch"], dict.fromkeys(kept, found["branch"]), str(root / name), Merge())
        found[name] = Checkpoint(root / name)
    with_rows(found["some"], found["merged"], [0, 1, 2], str(root / "subset"))
    return {**found, "subset": Checkpoint(root / "subset")}


def on_meta(checkpoint: Checkpoint) -> PreTrainedModel:
    return experts.on_meta(AutoConfig.from_pretrained(checkpoint.folder), torch.bfloat16)


def specs(checkpoint: Checkpoint) -> dict[str, Spec]:
    return {name: checkpoint.spec(name) for name in checkpoint.names}


@pytest.mark.parametrize(("verb", "size"), [("dense", 7_298_011_136), ("merged", 24_612_753_408)])
def test_models_have_their_published_sizes(
    models: dict[str, Checkpoint], verb: str, size: int
) -> None:
    """As the model cards of BAR-7B and BAR-5x7B say."""
    found = sum(torch.Size(spec.shape).numel() for spec in specs(models[verb]).values())
    assert found == size == sum(Shape.of(models[verb].config).weights().values())


@pytest.mark.parametrize(("verb", "count"), [("branch", 2), ("merged", 5), ("subset", 3)])
def test_every_tensor_has_its_place_in_the_model_that_trains(
    models: dict[str, Checkpoint], verb: str, count: int
) -> None:
    model, checkpoint = on_meta(models[verb]), models[verb]
    assert tensors.specs_of(experts.stacked_tensors(model)) == specs(checkpoint)
    assert checkpoint.config["num_experts"] == checkpoint.config["num_experts_per_tok"] == count
    assert checkpoint.config["rope_parameters"]["rope_theta"] == 500_000
    tokens = torch.zeros(1, 8, dtype=torch.long, device="meta")
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16, device="meta")
    assert model(tokens, mask, use_cache=False).logits.shape == (1, 8, 100_278)


@pytest.mark.parametrize("verb", ["dense", "branch", "merged"])
def test_shards_hold_everything_once(models: dict[str, Checkpoint], verb: str) -> None:
    folder = models[verb].folder
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
    assert {*index["weight_map"].values()} == {*sizes}
    assert max(sizes.values()) < 1.001 * tensors.SHARD_BYTES
    assert index["metadata"]["total_size"] == pytest.approx(sum(sizes.values()), rel=1e-4)


def test_what_each_stage_of_the_recipe_trains(models: dict[str, Checkpoint]) -> None:
    """By role and to the last weight: what the plan reckons with is what the optimizer is given."""
    recipe, model = (
        config.load("conf/olmo2_7b.yaml", ["storage=s3://b/x"]),
        on_meta(models["branch"]),
    )
    sizes, seen = Shape.of(models["branch"].config).weights(), []
    for expert in recipe.experts.values():
        for stage in (getattr(expert, name) for name in STAGES):
            if stage is None:
                continue
            freeze.apply(model, stage.learn)
            trained: Counter[str] = Counter()
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    trained[tensors.role_of(name)] += parameter.numel()
            # The anchor's row of the router is one of the anchor's weights, and never learns.
            half = {"router": sizes["router"] // 2}
            expected = {**sizes, **half}
            wanted = {r: n for r, n in expected.items() if getattr(stage.learn, r) > 0}
            assert trained == wanted
            seen.append(wanted)
    assert len(seen) == 8 and any("lm_head" in each for each in seen)
