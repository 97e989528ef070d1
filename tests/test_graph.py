"""The build graph: what is rerun, what is reused, and why."""

import dataclasses
from pathlib import Path

import pytest

from bar_ray import config, pipeline, storage
from bar_ray.cluster.pool import demand_of
from bar_ray.graph import VERBS, plan, render_plan, topological

TINY = "conf/tiny.yaml"


def built(tmp_path: Path, *overrides: str) -> pipeline.Pipeline:
    return pipeline.build(config.load(TINY, [f"storage={tmp_path}/store", *overrides]))


def finish(graph: pipeline.Pipeline, work: Path) -> None:
    """Make every step's artifact exist."""
    for step in topological(graph.targets):
        output = work / step.fingerprint
        output.mkdir(parents=True)
        (output / "file").write_text(step.label)
        storage.commit(str(output), step.artifact.uri, {})


def to_run(graph: pipeline.Pipeline) -> set[str]:
    return {p.step.label for p in plan(graph.targets) if not p.reused}


def test_everything_runs_at_first_and_nothing_after(tmp_path: Path) -> None:
    graph = built(tmp_path)
    planned = plan(graph.targets)
    assert not any(p.reused for p in planned)
    seen = set()
    for p in planned:
        assert {s.label for s in p.step.inputs.values()} <= seen, "inputs come first"
        seen.add(p.step.label)
    finish(graph, tmp_path / "work")
    assert to_run(built(tmp_path)) == set()


def test_changing_one_expert_reruns_only_what_depends_on_it(tmp_path: Path) -> None:
    finish(built(tmp_path), tmp_path / "work")
    assert to_run(built(tmp_path, "experts.code.sft.lr=0.01")) == {
        "sft code",
        "rlvr code",
        "merge merged",
        "route bar",
        "evaluate code-sft",
        "evaluate code-rlvr",
        "evaluate merged",
        "evaluate bar",
    }


def test_how_a_stage_is_run_does_not_change_its_fingerprint(tmp_path: Path) -> None:
    finish(built(tmp_path), tmp_path / "work")
    machinery = (
        "experts.code.sft.run.num_workers=2",
        "experts.code.rlvr.rollout.num_engines=4",
        "sandbox.slots=9",
        "evaluate.num_engines=3",
        "cluster.num_cpus=64",
    )
    assert to_run(built(tmp_path, *machinery)) == set()


def test_storage_root_does_not_change_fingerprints(tmp_path: Path) -> None:
    here, there = built(tmp_path / "a"), built(tmp_path / "b")
    assert here.bar.fingerprint == there.bar.fingerprint
    assert here.bar.artifact.uri != there.bar.artifact.uri


@pytest.mark.parametrize(
    "override",
    ["seed=1", "tiny.pretrain.steps=7", "router.fraction=0.1", "merge.include_base=false"],
)
def test_what_matters_changes_the_model(tmp_path: Path, override: str) -> None:
    assert built(tmp_path).bar.fingerprint != built(tmp_path, override).bar.fingerprint


def test_changed_data_is_noticed(tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"messages": []}\n')
    override = f"datasets.safety_sft={data}"
    before = built(tmp_path, override).experts["safety"].fingerprint
    data.write_text('{"messages": [1]}\n')
    assert built(tmp_path, override).experts["safety"].fingerprint != before


def test_plan_says_why(tmp_path: Path) -> None:
    graph = built(tmp_path)
    finish(graph, tmp_path / "work")
    planned = plan(built(tmp_path, "experts.code.sft.lr=0.01").targets)
    text = render_plan(planned)
    assert "settings, data or inputs changed" in text
    assert "needs sft code" in text and "finished" in text
    assert text.endswith(f"8 to run, {len(planned) - 8} reused")


def test_adding_an_expert_leaves_the_others_alone(tmp_path: Path) -> None:
    finish(built(tmp_path), tmp_path / "work")
    recipe = config.load(TINY, [f"storage={tmp_path}/store"])
    law = dataclasses.replace(recipe.experts["safety"].sft, steps=3)
    expert = dataclasses.replace(recipe.experts["safety"], sft=law)
    grown = dataclasses.replace(recipe, experts={**recipe.experts, "law": expert})
    running = to_run(pipeline.build(grown))
    assert running == {
        *("sft law", "evaluate law-sft"),
        *("merge merged", "route bar", "evaluate merged", "evaluate bar"),
    }


def test_every_verb_names_a_function_that_exists() -> None:
    for target, _ in VERBS.values():
        module, function = target.split(":")
        path = Path(*module.split(".")).with_suffix(".py")
        assert f"def {function}(" in path.read_text(), target


def test_rlvr_needs_learners_and_engines_together(tmp_path: Path) -> None:
    graph = built(tmp_path, "experts.math.rlvr.rollout.num_engines=3")
    recipe = config.load(TINY)
    rlvr = demand_of(graph.stages["math"]["rlvr"], "run", recipe)
    assert rlvr.resources(rlvr.at_least()) == {"CPU": 0.5 + 3 * 0.5}
    sft = demand_of(graph.stages["math"]["sft"], "run", recipe)
    assert sft.resources(sft.at_least()) == {"CPU": 1.0}
