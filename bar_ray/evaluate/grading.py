"""What lm-evaluation-harness calls when it runs our tasks: the rewards that grade here too.

`tasks.write` names these functions in its YAML. Answers are graded all at once, so that programs
run in the sandbox side by side.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from bar_ray import rewards
from bar_ray.recipe import Sandbox


def grade_all(
    resps: Iterable[Sequence[str]], docs: Iterable[Mapping[str, Any]]
) -> list[list[dict[str, Any]]]:
    """A filter: verdicts in place of answers."""
    answered = list(zip(resps, docs, strict=True))
    graded = [
        (text.strip(), json.loads(doc["ground_truth"]), doc["verifier"])
        for texts, doc in answered
        for text in texts
    ]
    verdicts = iter(rewards.grade(graded, rewards.sandbox_for(Sandbox())))
    return [[asdict(next(verdicts)) for _ in texts] for texts, _ in answered]


def score(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
    """Of one item: what its verdict says."""
    [verdict] = results[0] if isinstance(results[0], list) else results
    return {"score": verdict["score"]}
