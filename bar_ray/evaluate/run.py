"""The `evaluate` verb: any checkpoint over all categories with vLLM actors under Ray Data.

Prompts go in as tokens and completions come back as tokens; the rewards that train also grade.
Steps that are ready together are evaluated together: one engine takes the weights of one checkpoint
after the other, as long as they are of one shape, instead of starting anew for each.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from bar_ray import rewards
from bar_ray.evaluate import intervals
from bar_ray.evaluate.items import require_positions, test_items
from bar_ray.graph import Step
from bar_ray.recipe import Evaluate
from bar_ray.rollout.batch import BatchEngine
from bar_ray.types import UserError, Verdict

BATCH_PROMPTS = 256
NOT_WEIGHTS = ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@dataclass(frozen=True)
class Test:
    """A checkpoint and what it is asked."""

    step: Step
    shape: str  # equal for checkpoints that differ in nothing but weights
    items: list[dict[str, Any]]

    @property
    def place(self) -> str:
        return self.step.inputs["model"].artifact.uri


def run(steps: Sequence[Step], run: Any) -> dict[str, str]:
    """Steps of equal settings and data, with an input `model` each.

    Output of each: scores.json, samples.jsonl. Returns users' mistakes, by the step's URI.
    """
    tests: list[Test] = []
    mistakes: dict[str, str] = {}
    for step in steps:
        try:
            tests.append(_test(step, run))
        except UserError as error:
            mistakes[step.artifact.uri] = str(error)
    sandbox = rewards.sandbox_for(run.recipe.sandbox)
    for alike in _by_shape(tests):
        for test, completions in generate(alike, steps[0].settings):
            _grade(test, completions, sandbox, run)
    return mistakes


def _test(step: Step, run: Any) -> Test:
    folder, settings = run.fetch(step.inputs["model"]), step.settings
    items = [
        item
        for category in step.data
        for item in test_items(folder, category, run.locate(step, category), settings.limit)
    ]
    require_positions(folder, items, settings)
    beside = [Path(folder, name) for name in NOT_WEIGHTS if Path(folder, name).exists()]
    return Test(step, "\n".join(path.read_text() for path in beside), items)


def _by_shape(tests: Sequence[Test]) -> list[list[Test]]:
    """Tests whose checkpoints one engine can hold in turn, in their order."""
    groups: dict[str, list[Test]] = defaultdict(list)
    for test in tests:
        groups[test.shape].append(test)
    return list(groups.values())


def _grade(test: Test, completions: list[dict[str, Any]], sandbox: Any, run: Any) -> None:
    graded = [
        (c["text"], i["ground_truth"], i["verifier"])
        for i, c in zip(test.items, completions, strict=True)
    ]
    verdicts = rewards.grade(graded, sandbox)
    scores = score(test.items, verdicts)
    samples = list(map(sample, test.items, completions, verdicts))
    write(scores, samples, test.step, run)
    shown = "  ".join(f"{name} {value:.1f}" for name, value in scores["scores"].items())
    run.say(test.step, shown)


def write(scores: dict[str, Any], samples: Sequence[dict], step: Step, run: Any) -> None:
    """The output of an evaluation: its scores, and every item's."""
    with run.output(step, {"scores": scores}) as output:
        Path(output, "scores.json").write_text(json.dumps(scores, indent=1))
        lines = [json.dumps(each) + "\n" for each in samples]
        Path(output, "samples.jsonl").write_text("".join(lines))


def generate(
    tests: Sequence[Test], settings: Evaluate
) -> Iterator[tuple[Test, list[dict[str, Any]]]]:
    """Each test with one completion per item, in order, as soon as it has them all."""
    rows = [
        {"test": number, "place": place, "prompt": item["prompt"], "model": test.place}
        for number, test in enumerate(tests)
        for place, item in enumerate(test.items)
    ]
    longest = max(len(row["prompt"]) for row in rows)
    num_blocks = max(len(tests), settings.num_engines)
    completed = ray.data.from_items(rows, override_num_blocks=num_blocks).map_batches(
        BatchEngine,
        fn_constructor_args=(tests[0].place, longest, settings.max_tokens, settings.temperature),
        batch_size=BATCH_PROMPTS,
        concurrency=settings.num_engines,
        num_cpus=settings.cpus_per_engine,
        num_gpus=settings.gpus_per_engine or None,
        resources=settings.resources,
    )
    found: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for row in completed.iter_rows():
        mine = found[row["test"]]
        mine.append(row)
        if len(mine) == len(tests[row["test"]].items):
            yield tests[row["test"]], sorted(found.pop(row["test"]), key=lambda r: r["place"])


def score(items: list[dict], verdicts: list[Verdict]) -> dict[str, Any]:
    """Percent by category, their unweighted mean as `overall`, intervals, outcomes by category."""
    by_category: dict[str, list[Verdict]] = defaultdict(list)
    for item, verdict in zip(items, verdicts, strict=True):
        by_category[item["category"]].append(verdict)
    means = {c: (sum(v.score for v in vs) / len(vs), len(vs)) for c, vs in by_category.items()}
    scores = {c: 100 * mean for c, (mean, _) in means.items()}
    scores["overall"] = sum(scores.values()) / len(scores)
    bounds = {c: intervals.wilson(*each) for c, each in means.items()}
    bounds["overall"] = intervals.of_mean(list(means.values()))
    outcomes = {c: dict(Counter(v.outcome for v in vs)) for c, vs in by_category.items()}
    return {
        "scores": scores,
        "intervals": bounds,
        "outcomes": outcomes,
        "items": {c: len(v) for c, v in by_category.items()},
    }


def sample(item: dict[str, Any], completion: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    return {
        **{"category": item["category"], "id": item["id"], "completion": completion["text"]},
        **{"score": verdict.score, "outcome": verdict.outcome, "tokens": int(completion["tokens"])},
    }
