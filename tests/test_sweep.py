"""Sweeps: what a trial is, how it is judged, what is written of it."""

from dataclasses import replace
from pathlib import Path

import pytest

from bar_ray import config, pipeline, sweep
from bar_ray.graph import topological
from bar_ray.recipe import Sweep
from bar_ray.sweep import Source, Trial
from bar_ray.types import UserError

UNFREEZING = "conf/sweeps/unfreezing.yaml"


def test_a_trial_is_the_recipe_with_other_settings() -> None:
    source = Source.of(UNFREEZING, ["evaluate.limit=5"], config.load(UNFREEZING))
    settings = {"experts.tool_use.sft.learn.lm_head": 1, "stages.rlvr.lr": 0.001}
    plain, changed = source.recipe({}), source.recipe(settings)
    assert changed.experts["tool_use"].sft.learn.lm_head == 1
    assert changed.experts["math"].rlvr.lr == changed.experts["code"].rlvr.lr == 0.001
    assert plain.evaluate.limit == changed.evaluate.limit == 5
    before, after = (
        {s.artifact.uri for s in topological(pipeline.build(r).targets)} for r in (plain, changed)
    )
    shared = {place for place in before & after if "/sft/" in place or "/midtrain/" in place}
    assert len(shared) == 5, "all but tool use's SFT is trained once for both"
    common = {step.artifact.uri for step in sweep.prepare(plain)}
    assert common <= before & after and not [p for p in common if "/sft/" in p]


def test_a_trial_is_judged_after_sft_at_the_end_of_each_expert_and_as_a_whole() -> None:
    recipe = config.load(UNFREEZING)
    first, second, third = sweep.rungs(pipeline.build(recipe), recipe)
    assert [s.inputs["model"].verb for s in first.values()] == ["sft"] * 4
    assert [s.inputs["model"].verb for s in second.values()] == ["rlvr", "rlvr", "sft", "sft"]
    assert [s.inputs["model"].verb for s in third.values()] == ["route"]
    assert first["safety"] == second["safety"], "scored once"


def test_another_space_is_another_sweep() -> None:
    recipe = config.load(UNFREEZING)
    source = Source.of(UNFREEZING, [], recipe)

    def folder(**changed: object) -> str:
        return sweep.folder_of(source, replace(recipe.sweep, **changed), recipe, "unfreezing")

    assert folder() == folder(concurrent=7)
    assert len({folder(), folder(trials=3), folder(space={"seed": {"choice": [1]}})}) == 3


def test_space_is_drawn_as_described() -> None:
    space = {"a": {"choice": [0, 1]}, "b": {"uniform": [0.5, 2.0]}, "c": {"loguniform": [0.1, 1]}}
    drawn = sweep.space(Sweep(space=space))
    assert {drawn["a"].sample() for _ in range(50)} == {0, 1}
    assert all(0.5 <= drawn["b"].sample() <= 2 for _ in range(50))
    assert all(0.1 <= drawn["c"].sample() <= 1 for _ in range(50))
    with pytest.raises(UserError, match="names no setting"):
        sweep.space(Sweep())


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("{x: {choices: [1]}}", "did you mean 'choice'"),
        ("{x: {uniform: [2, 1]}}", r"must be \[low, high\]"),
        ("{x: {choice: [1], uniform: [1, 2]}}", "give one of"),
    ],
)
def test_a_space_that_means_nothing_is_refused(tmp_path: Path, written: str, message: str) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_text(f"extends: {Path('conf/tiny.yaml').resolve()}\nsweep: {{space: {written}}}\n")
    with pytest.raises(UserError, match=message):
        config.load(str(path))


def test_results_are_ranked_and_the_best_is_a_recipe(tmp_path: Path) -> None:
    trials = [
        Trial({"stages.rlvr.lr": 0.001, "stages.rlvr.learn.attention": 0.5}, 3, 91.0),
        Trial({"stages.rlvr.lr": 0.0004, "stages.rlvr.learn.attention": "a name"}, 1, 95.0),
        Trial({"stages.rlvr.lr": 0.0002, "stages.rlvr.learn.attention": 0.1}, 1, 0.0, "it broke"),
    ]
    lines = sweep.table(trials).splitlines()
    assert "91.0 routed model" in lines[0] and "95.0 after SFT" in lines[1]
    assert "it broke" in lines[2]
    source = Source.of(UNFREEZING, [], config.load(UNFREEZING))
    sweep.write(source, trials, str(tmp_path))
    best = config.load(str(tmp_path / "best.yaml"))
    assert best.experts["code"].rlvr.lr == 0.001
    assert best.experts["code"].rlvr.learn.attention == 0.5
    assert b"</svg>" in (tmp_path / "sweep.svg").read_bytes()
