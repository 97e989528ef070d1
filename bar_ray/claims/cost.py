"""What an update costs: tokens, FLOPs and seconds of training, by domain.

Tokens and seconds are what the runs recorded. FLOPs are counted from the model's sizes
(`bar_ray.cost`), rollouts as forward passes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from bar_ray import storage
from bar_ray.claims.arms import Arms
from bar_ray.claims.table import Estimate, exactly
from bar_ray.cost import Shape
from bar_ray.graph import Step, topological
from bar_ray.recipe import Recipe, Rlvr
from bar_ray.report import history

UNITS = {"tokens": 1e6, "flops": 1e12, "seconds": 60.0}
NAMES = {"tokens": "million tokens", "flops": "TFLOP", "seconds": "minutes of training"}


@dataclass(frozen=True)
class Cost:
    tokens: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.tokens + other.tokens, self.flops + other.flops, self.seconds + other.seconds
        )


def cost_of(steps: Iterable[Step], past: history.History) -> dict[str, Cost]:
    """Cost of every training step, by its URI."""
    found = {}
    for step in steps:
        rows = past.metrics.get(history.identity(step), [])
        if not rows:
            continue
        stage = step.settings["stage"]
        tokens = history.tokens_of(rows)
        per_token = shape_of(step.inputs["model"].artifact.uri).flops(stage.learn, stage.seq_len)
        flops = tokens * per_token.total
        if isinstance(stage, Rlvr):
            drawn = sum(row.get("rollout_tokens", 0.0) for row in rows)
            flops += drawn * per_token.forward
        found[step.artifact.uri] = Cost(tokens, flops, history.seconds_of(rows))
    return found


@lru_cache(maxsize=64)
def shape_of(uri: str) -> Shape:
    """Of a checkpoint on the storage."""
    return Shape.of(storage.read_json(storage.join(uri, "config.json")))


def bar_updates(arms: Arms, costs: Mapping[str, Cost]) -> list[Cost]:
    """Of adding one domain after the other: its own stages and the router."""
    router = costs.get(arms.bar.bar.artifact.uri, Cost())
    updates = []
    for stages in arms.bar.stages.values():
        own = [costs.get(step.artifact.uri, Cost()) for step in stages.values()]
        updates.append(sum(own, router))
    return updates


def retraining_updates(model: Step, num_domains: int, costs: Mapping[str, Cost]) -> list[Cost]:
    """The same by training everything again: the n-th update repeats the n - 1 before it.

    Modelled from one retraining on all domains, taken as equal parts.
    """
    steps = [s for s in topological([model]) if s.name.startswith(model.name)]
    whole = sum((costs.get(step.artifact.uri, Cost()) for step in steps), Cost())
    parts = [n / num_domains for n in range(1, num_domains + 1)]
    return [Cost(whole.tokens * p, whole.flops * p, whole.seconds * p) for p in parts]


def arms(arms: Arms) -> None:
    arms.add("bar", arms.bar.bar)
    arms.retrain("retrain with mid-training", with_midtrain=True)


def measure(
    recipe: Recipe, by_seed: Mapping[int, Arms], past: history.History
) -> dict[str, Estimate]:
    """Cumulative cost of 1 to n updates under BAR and under retraining, over the seeds."""
    num_domains = len(recipe.experts)
    curves: dict[tuple[str, str], list[list[float]]] = {}
    for each in by_seed.values():
        retrained = each.models["retrain with mid-training"]
        steps = topological([each.bar.bar, retrained])
        costs = cost_of(steps, past)
        kinds = {
            "BAR": bar_updates(each, costs),
            "retraining": retraining_updates(retrained, num_domains, costs),
        }
        for kind, updates in kinds.items():
            for unit, size in UNITS.items():
                curve = [value / size for value in accumulate(getattr(c, unit) for c in updates)]
                curves.setdefault((kind, NAMES[unit]), []).append(curve)
    return {
        f"{kind}, {unit}, {count + 1} updates": exactly([each[count] for each in of_seeds], unit)
        for (kind, unit), of_seeds in curves.items()
        for count in range(num_domains)
    }
