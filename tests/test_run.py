"""Which steps of a plan are run together, and how workers go through them."""

import io
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from ray.train.v2.api.exceptions import WorkerGroupError

from bar_ray import storage
from bar_ray.cluster import run as runs
from bar_ray.cluster.pace import Pace
from bar_ray.cluster.run import Executor, reason_of
from bar_ray.graph import Step, key
from bar_ray.log import some
from bar_ray.recipe import Evaluate, Run, Stage
from bar_ray.stages import start
from bar_ray.types import UserError


def evaluation(number: int, settings: Evaluate, root: Path) -> Step:
    model = Step("route", "bar", {"number": number}, {}, {}, str(root))
    tests = {"math": ("tiny:math/test.jsonl", "content")}
    return Step("evaluate", f"model-{number}", settings, {"model": model}, tests, str(root))


@pytest.fixture
def executor() -> Executor:
    """One whose pool, journal and cluster are not asked."""
    made = Executor.__new__(Executor)
    made.todo, made.alone, made.waits_for, made.running = {}, set(), {}, {}
    return made


def begun(executor: Executor, ready: list[Step], allowed: list[Step]) -> list[list[Step]]:
    """What the pool's leave for `allowed` starts, group by group."""
    executor.todo |= {key(step): step for step in ready}
    executor.waits_for |= {key(step): set() for step in ready}
    groups = []
    for step in allowed:
        if key(step) in executor.todo:
            groups.append(executor._together(step, ready, allowed))
            executor.running[len(executor.running)] = (groups[-1], 0.0)
            for each in groups[-1]:
                del executor.todo[key(each)]
    return groups


def test_evaluations_share_engines_evenly(executor: Executor, tmp_path: Path) -> None:
    ready = [evaluation(n, Evaluate(), tmp_path) for n in range(7)]
    groups = begun(executor, ready, ready[:2])
    assert [len(group) for group in groups] == [4, 3] and not executor.todo
    assert groups[0][0] is ready[0] and groups[1][0] is ready[1]


def test_a_group_has_a_size(executor: Executor, tmp_path: Path) -> None:
    ready = [evaluation(n, Evaluate(), tmp_path) for n in range(30)]
    [group] = begun(executor, ready, ready[:1])
    assert len(group) == runs.EVALUATED and len(executor.todo) == 30 - runs.EVALUATED


def test_only_equal_questions_share_an_engine(executor: Executor, tmp_path: Path) -> None:
    short = Evaluate(max_tokens=8)
    ready = [evaluation(n, Evaluate() if n % 2 else short, tmp_path) for n in range(6)]
    groups = begun(executor, ready, ready[:1])
    assert groups == [[ready[0], ready[2], ready[4]]]


def test_what_failed_together_is_tried_alone(executor: Executor, tmp_path: Path) -> None:
    ready = [evaluation(n, Evaluate(), tmp_path) for n in range(4)]
    executor.alone = {key(ready[0]), key(ready[1])}
    groups = begun(executor, ready, ready[:3])
    assert groups == [[ready[0]], [ready[1]], [ready[2], ready[3]]]


def test_other_steps_have_a_process_each(executor: Executor, tmp_path: Path) -> None:
    ready = [replace(evaluation(n, Evaluate(), tmp_path), verb="merge") for n in range(3)]
    assert begun(executor, ready, ready[:1]) == [[ready[0]]]


def training(number: int, run: Run, root: Path, verb: str = "route") -> Step:
    settings = {"stage": Stage(steps=number + 1, run=run)}
    return Step(verb, f"model-{number}", settings, {}, {}, str(root))


def test_small_trainings_run_in_a_row_when_told_so(executor: Executor, tmp_path: Path) -> None:
    ready = [training(n, Run(together=3), tmp_path) for n in range(5)]
    groups = begun(executor, ready, ready[:2])
    assert [len(group) for group in groups] == [3, 2]


@pytest.mark.parametrize(
    "others",
    [
        Run(),
        Run(together=3, threads=2),
        Run(together=3, num_workers=2, min_workers=1),
    ],
)
def test_trainings_that_need_other_workers_start_alone(
    executor: Executor, tmp_path: Path, others: Run
) -> None:
    ready = [training(0, others, tmp_path), training(1, Run(together=3), tmp_path)]
    ready.append(training(2, Run(together=3), tmp_path, verb="sft"))
    assert begun(executor, ready, ready[:1]) == [[ready[0]]]


def test_what_waits_for_a_training_alone_follows_it(executor: Executor, tmp_path: Path) -> None:
    """Of the same kind; not while something else is missing, nor beyond the size of a group."""
    steps = [training(n, Run(together=3), tmp_path) for n in range(6)]
    first, other, second, third, fourth, mixed = steps
    unlike, ready = training(6, Run(together=3, threads=2), tmp_path), [first, other]
    waits = [(unlike, [first]), (mixed, [first, other]), (second, [first])]
    waits += [(third, [second, first]), (fourth, [third, second, first])]
    executor.todo = {key(step): step for step, _ in waits}
    executor.waits_for = {key(step): set(map(key, needed)) for step, needed in waits}
    assert begun(executor, ready, ready) == [[first, second, third], [other]]

    executor.running.clear()
    executor.todo |= {key(step): step for step in (second, mixed)}
    executor.alone = {key(second)}
    assert begun(executor, ready, ready[:1]) == [[first, other, mixed]]


def test_followers_need_what_one_process_has_written(executor: Executor, tmp_path: Path) -> None:
    several = Run(together=3, num_workers=2)
    first, second = (training(n, several, tmp_path) for n in range(2))
    executor.todo[key(second)], executor.waits_for[key(second)] = second, {key(first)}
    assert begun(executor, [first], [first]) == [[first]]


class Rank:
    """A worker that commits an artifact, unless its step is the third."""

    seen: ClassVar[list[str]] = []

    def __init__(self, step: Step, run: Any) -> None:
        self.step, self.run, self.ledger = step, run, io.StringIO()

    def loop(self) -> dict[str, Any]:
        self.seen.append(self.step.name)
        if self.step.name == "model-2":
            raise UserError("no such dataset")
        (self.run / self.step.name).mkdir()
        storage.commit(str(self.run / self.step.name), self.step.artifact.uri, {})
        return {"steps": 1}


def test_workers_make_in_a_row_what_is_not_there_yet(tmp_path: Path) -> None:
    steps = [training(n, Run(together=4), tmp_path) for n in range(4)]
    config = {"worker": f"{__name__}:Rank", "run": tmp_path}
    Rank.seen.clear()
    assert start._work({**config, "steps": steps[:2]}) == {"steps": 1}
    assert start._work({**config, "steps": steps}) == {"user_error": "no such dataset"}
    assert Rank.seen == ["model-0", "model-1", "model-2"]


def test_the_end_of_a_run_is_told_from_the_steps_before() -> None:
    now = [100.0]
    pace = Pace(lambda: now[0])
    assert pace.eta(["sft"]) is None
    now[0] = 160.0  # two at a time: 120 seconds of work in 60
    for verb, seconds in (("sft", 10), ("sft", 30), ("rlvr", 80)):
        pace.note(verb, seconds)
    assert pace.eta([]) == 0
    assert pace.eta(["rlvr", "rlvr", "rlvr"]) == pytest.approx(120)
    assert pace.eta(["sft", "merge"]) == pytest.approx(30)  # merge: as long as the mean, 40


def test_many_names_are_told_by_the_first() -> None:
    assert some(["a"]) == "a"
    assert some(["a", "b", "c"]) == "a, b, c"
    assert some(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"


def test_a_failure_of_workers_says_what_failed() -> None:
    try:
        raise TypeError("got multiple values")
    except TypeError as error:
        told = f"Training failed:\n[Rank 0 Error Snippet]:\n{traceback.format_exc()}"
        failure = WorkerGroupError(told, {0: error})
    assert reason_of(failure) == "WorkerGroupError: TypeError: got multiple values"


def test_a_transcript_may_tell_of_a_step(tmp_path: Path) -> None:
    """The step that runs, and the number of an optimizer step, are both called `step`."""
    written: list[dict[str, Any]] = []

    class Journal:
        class transcript:
            remote = staticmethod(lambda **fields: written.append(fields))

    step = Step("rlvr", "math", {}, storage_uri=str(tmp_path))
    runs.Run("r1", None, Journal, "").transcript(step, step=3, prompt="1+1?")
    [told] = written
    assert told["step"] == 3 and told["name"] == "math" and told["prompt"] == "1+1?"
