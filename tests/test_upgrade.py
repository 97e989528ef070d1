"""Changing one expert of a published model: what is worked out before anything runs."""

from dataclasses import replace
from pathlib import Path

import pytest

from bar_ray import config, pipeline, registry, upgrade, versions
from bar_ray.recipe import Recipe
from bar_ray.registry import MODEL, MODELS, Version
from bar_ray.types import UserError
from bar_ray.upgrade import Change


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    """A storage where math has two versions, code one, and models of both were published."""
    recipe = config.load("conf/tiny.yaml", [f"storage={tmp_path}"])
    branch = versions.line_of(pipeline.build(recipe).branch)
    for domain, name in (("math", "aa"), ("math", "bb"), ("code", "cc"), ("safety", "dd")):
        version = Version(f"artifacts/sft/{domain}/{name}", name, (branch, f"sft {domain} {name}"))
        registry.publish(str(tmp_path), domain, version)
    for name, experts in (("m1", {"math": 1, "code": 1}), ("m2", {"math": 2, "code": 1})):
        lineage = ("train base b0", branch, f"merge merged {name}", f"route bar {name}")
        model = Version(f"artifacts/route/bar/{name}", name, lineage, experts=experts)
        registry.publish(str(tmp_path), MODEL, model, MODELS)
    return recipe


def numbers(found: upgrade.Upgrade) -> dict[str, int]:
    return {domain: version.version for domain, version in found.after.items()}


def test_changes_are_worked_out_from_the_registry(recipe: Recipe) -> None:
    assert numbers(upgrade.work_out(recipe, Change("replace", "math", 1))) == {"math": 1, "code": 1}
    assert numbers(upgrade.work_out(recipe, Change("replace", "math"))) == {"math": 2, "code": 1}
    assert [*numbers(upgrade.work_out(recipe, Change("add", "safety")))][-1] == "safety"
    assert numbers(upgrade.work_out(recipe, Change("remove", "math"))) == {"code": 1}


def test_a_rollback_is_the_model_that_was_published(recipe: Recipe) -> None:
    back = upgrade.work_out(recipe, Change("rollback"))
    assert back.published.fingerprint == "m1" and numbers(back) == {"math": 1, "code": 1}
    # The recipe of today may differ: what was published counts.
    changed = replace(recipe, router=replace(recipe.router, lr=1.0))
    assert upgrade.work_out(changed, Change("rollback")).published.fingerprint == "m1"
    assert back.publish() == 1
    assert registry.latest(recipe.storage, MODEL, MODELS).fingerprint == "m1"
    with pytest.raises(UserError, match="no earlier version"):
        upgrade.work_out(recipe, Change("rollback"))
    assert upgrade.work_out(recipe, Change("rollback", version=2)).published.fingerprint == "m2"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (Change("replace", "maths"), "did you mean 'math'"),
        (Change("replace", "math", 7), "no version of 'math' has the number 7; there are 1, 2"),
        (Change("replace", "safety"), "no expert 'safety'"),
        (Change("add", "math"), "has an expert 'math' already"),
        (Change("add", "tool_use"), "no version of 'tool_use' is published"),
        (Change("rollback", version=9), "has the number 9; there are 1, 2"),
    ],
)
def test_mistakes_are_one_message(recipe: Recipe, change: Change, message: str) -> None:
    with pytest.raises(UserError, match=message):
        upgrade.work_out(recipe, change)


def test_the_last_expert_stays(recipe: Recipe) -> None:
    alone = Version("artifacts/route/bar/m3", "m3", experts={"code": 1})
    registry.publish(recipe.storage, MODEL, alone, MODELS)
    with pytest.raises(UserError, match="the only expert"):
        upgrade.work_out(recipe, Change("remove", "code"))


def test_experts_of_another_base_are_refused(recipe: Recipe) -> None:
    other = replace(recipe, seed=recipe.seed + 1)
    with pytest.raises(UserError, match="trained from another base"):
        _ = upgrade.work_out(other, Change("replace", "math", 1)).model


def test_what_is_published_but_gone_is_said(recipe: Recipe) -> None:
    with pytest.raises(UserError, match=r"sft/\w+/\w\w is published, but no longer there"):
        _ = upgrade.work_out(recipe, Change("replace", "math", 1)).model


def test_the_router_forgets_the_data_of_an_expert_that_is_gone(recipe: Recipe) -> None:
    kept = {name: e for name, e in recipe.experts.items() if name != "safety"}
    router = versions.with_experts(recipe, kept).router
    assert "safety_sft" not in router.data and router.data["tool_use_sft"] == 2
    everything = versions.with_experts(recipe, recipe.experts)
    assert everything == recipe, "nothing changes for the recipe's own experts"
    older = replace(recipe.experts["code"].sft, data={"general_sft": 0.5, "code_careless": 0.5})
    before = {**recipe.experts, "code": replace(recipe.experts["code"], sft=older)}
    router = versions.with_experts(recipe, before).router
    assert "code_careful" not in router.data and router.data["code_careless"] == 1
