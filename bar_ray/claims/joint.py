"""Stages for models that are not branched, from the stages of the experts they are compared with.

Budgets are equal by construction: training on all domains at once takes as many tokens of each
dataset as the experts and the router took of it one by one, and as many prompts in RLVR.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TypeVar

from bar_ray.recipe import Dense, Learn, Stage
from bar_ray.types import UserError

S = TypeVar("S", bound=Stage)


def joint(stages: Sequence[S]) -> S:
    """One stage with the data of all: the first one's settings, the sum of their steps."""
    first = stages[0]
    if any(stage.steps <= 0 for stage in stages):
        raise UserError("equal budgets need `steps` in every stage that is compared, not `epochs`")
    rows: dict[str, float] = defaultdict(float)
    for stage in stages:
        if stage.seq_len != first.seq_len:
            raise UserError(
                f"stages of one kind have rows of {stage.seq_len} and {first.seq_len} tokens "
                "(seq_len); a model trained on all of their data needs one length"
            )
        total = sum(stage.data.values())
        for name, share in stage.data.items():
            rows[name] += stage.steps * stage.batch_size * share / total
    steps = round(sum(rows.values()) / first.batch_size)
    return replace(first, data=dict(rows), steps=steps)


def dense(stage: Stage, learn: Learn) -> Dense:
    """The same stage for a dense model."""
    kept = {f.name: getattr(stage, f.name) for f in fields(Stage)}
    return Dense(**{**kept, "learn": learn})
