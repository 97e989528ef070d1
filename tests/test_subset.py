"""Some experts of a published model: which stay, and what is refused."""

from pathlib import Path

import pytest

from bar_ray import config, registry, subset
from bar_ray.recipe import Recipe
from bar_ray.registry import MODEL, MODELS, Version
from bar_ray.types import UserError


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    recipe = config.load("conf/tiny.yaml", [f"storage={tmp_path}"])
    experts = {"math": 1, "code": 1, "safety": 1}
    model = Version("artifacts/route/bar/m1", "m1", experts=experts)
    registry.publish(recipe.storage, MODEL, model, MODELS)
    return recipe


@pytest.mark.parametrize(
    ("experts", "without", "kept", "left_out"),
    [
        (["code"], [], ("code",), ["math", "safety"]),
        (["safety", "math"], [], ("math", "safety"), ["code"]),
        ([], ["math"], ("code", "safety"), ["math"]),
    ],
)
def test_what_stays_is_in_the_order_of_the_slots(
    recipe: Recipe, experts: list, without: list, kept: tuple, left_out: list
) -> None:
    found = subset.work_out(recipe, experts, without)
    assert (found.experts, found.left_out) == (kept, left_out)


@pytest.mark.parametrize(
    ("experts", "without", "message"),
    [
        (["maths"], [], "did you mean 'math'"),
        ([], ["tool_use"], "no expert 'tool_use'"),
        (["math", "code", "safety"], [], "all experts of the model"),
        ([], ["math", "code", "safety"], "no expert is left"),
    ],
)
def test_mistakes_are_one_message(
    recipe: Recipe, experts: list, without: list, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        subset.work_out(recipe, experts, without)


def test_without_a_model_there_is_no_part_of_it(tmp_path: Path) -> None:
    recipe = config.load("conf/tiny.yaml", [f"storage={tmp_path}"])
    with pytest.raises(UserError, match="has no published model"):
        subset.work_out(recipe, ["math"])
