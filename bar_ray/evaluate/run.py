"""The `evaluate` verb: any checkpoint over all categories with vLLM actors under Ray Data.

Prompts go in as tokens and completions come back as tokens; the rewards that train also grade.
Steps that are ready together are evaluated together: one engine takes the weights of one checkpoint
after the other, as long as they are of one shape, instead of starting anew for each.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from bar_ray import categories, rewards
from bar_ray.evaluate import harness, intervals
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
    found: harness.Found  # of the harness's tests

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
            _conclude(test, completions, sandbox, run)
    return mistakes


def _test(step: Step, run: Any) -> Test:
    folder, settings = run.fetch(step.inputs["model"]), step.settings
    items = [
        item
        for category in step.data
        for item in test_items(folder, category, run.locate(step, category), settings.limit)
    ]
    if items:
        require_positions(folder, items, settings)
    found = harness.Found()
    if settings.harness:
        found = harness.run(step.inputs["model"].artifact.uri, settings)
        for name, reason in found.left_out.items():
            run.say(step, f"{name} is left out: {reason}")
    if not items and not found.samples:
        raise UserError("no test is left: not one could be downloaded")
    beside = [Path(folder, name) for name in NOT_WEIGHTS if Path(folder, name).exists()]
    return Test(step, "\n".join(path.read_text() for path in beside), items, found)


def _by_shape(tests: Sequence[Test]) -> list[list[Test]]:
    """Tests whose checkpoints one engine can hold in turn, in their order."""
    groups: dict[str, list[Test]] = defaultdict(list)
    for test in tests:
        groups[test.shape].append(test)
    return list(groups.values())


def _conclude(test: Test, completions: list[dict[str, Any]], sandbox: Any, run: Any) -> None:
    """Grade our own tests, and write them with the harness's."""
    graded = [
        (c["text"], i["ground_truth"], i["verifier"])
        for i, c in zip(test.items, completions, strict=True)
    ]
    verdicts = rewards.grade(graded, sandbox)
    samples = [*map(sample, test.items, completions, verdicts), *test.found.samples]
    scores = score(samples)
    if test.step.settings.harness:
        scores |= {"harness": test.found.reported, "left_out": test.found.left_out}
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
    if not tests[0].items:  # the harness's alone
        yield from ((test, []) for test in tests)
        return
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


def score(samples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Percent by category, set of categories and `overall`; intervals, outcomes, items."""
    by_category: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for each in samples:
        by_category[each["category"]].append(each)
    means = {c: (sum(s["score"] for s in ss) / len(ss), len(ss)) for c, ss in by_category.items()}
    scores = categories.with_means({c: 100 * mean for c, (mean, _) in means.items()})
    bounds = {c: intervals.wilson(*each) for c, each in means.items()}
    for name in scores.keys() - means.keys():
        counted = categories.weights(categories.members(name, means))
        bounds[name] = intervals.of_mean([(w, *means[c]) for c, w in counted.items()])
    return {
        "scores": scores,
        "intervals": {name: bounds[name] for name in scores},
        "outcomes": {c: dict(Counter(s["outcome"] for s in ss)) for c, ss in by_category.items()},
        "items": {c: len(ss) for c, ss in by_category.items()},
    }


def sample(item: dict[str, Any], completion: dict[str, Any], verdict: Verdict) -> dict[str, Any]:
    return {
        **{"category": item["category"], "id": item["id"], "completion": completion["text"]},
        **{"score": verdict.score, "outcome": verdict.outcome, "tokens": int(completion["tokens"])},
    }
