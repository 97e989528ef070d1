"""Scores of many models over several seeds, item by item, and what differs beyond noise."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev, variance

from bar_ray import categories, storage
from bar_ray.categories import OVERALL
from bar_ray.graph import Step

Items = Mapping[str, Mapping[str, float]]  # by category and item
PERCENT, POINTS = "percent right", "points"
Z95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A quantity over seeds; `low` and `high` are its 95 % interval over test items."""

    mean: float
    by_seed: tuple[float, ...]
    low: float
    high: float
    unit: str = POINTS

    @property
    def spread(self) -> float:
        """Standard deviation over seeds."""
        return stdev(self.by_seed) if len(self.by_seed) > 1 else 0.0

    @property
    def is_above(self) -> bool:
        """Above zero beyond noise: the interval, and every seed."""
        return self.low > 0 and min(self.by_seed) > 0

    @property
    def is_below(self) -> bool:
        return self.high < 0 and max(self.by_seed) < 0

    def __str__(self) -> str:
        return f"{self.mean:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"


def exactly(values: Sequence[float], unit: str) -> Estimate:
    """A quantity without test items, of each seed: its interval is the range of the seeds."""
    return Estimate(fmean(values), tuple(values), min(values), max(values), unit)


class Table:
    """Item scores, 0 to 1, by seed, model, category and item."""

    def __init__(self, items: Mapping[int, Mapping[str, Items]]) -> None:
        self.items = items
        self.seeds = list(items)
        first = self.items[self.seeds[0]]
        self.models = list(first)
        self.tests = list(first[self.models[0]])
        self.categories = [*self.tests, *categories.sets(self.tests)]

    @classmethod
    def read(cls, evaluations: Mapping[int, Mapping[str, Step]]) -> "Table":
        """From the artifacts of finished evaluations, by seed and model."""
        return cls(
            {
                seed: {name: _read(step) for name, step in models.items()}
                for seed, models in evaluations.items()
            }
        )

    def score(self, model: str, category: str = OVERALL) -> Estimate:
        """Percent right of one model."""
        return replace(self._estimate([(model, 1.0)], category), unit=PERCENT)

    def difference(self, model: str, other: str, category: str = OVERALL) -> Estimate:
        """How far `model` is above `other`, paired by item."""
        return self._estimate([(model, 1.0), (other, -1.0)], category)

    def _estimate(self, terms: Sequence[tuple[str, float]], category: str) -> Estimate:
        weights = categories.weights(categories.members(category, self.tests))
        by_seed, errors = [], []
        for seed in self.seeds:
            mean, error = 0.0, 0.0
            for each, weight in weights.items():
                values = self._values(seed, terms, each)
                mean += weight * fmean(values)
                error += weight**2 * variance(values) / len(values) if len(values) > 1 else 0.0
            by_seed.append(100 * mean)
            errors.append(100**2 * error)
        mean, half = fmean(by_seed), Z95 * math.sqrt(sum(errors)) / len(errors)
        return Estimate(mean, tuple(by_seed), mean - half, mean + half)

    def _values(self, seed: int, terms: Sequence[tuple[str, float]], category: str) -> list[float]:
        models = self.items[seed]
        ids = models[terms[0][0]][category]
        return [sum(sign * models[name][category][i] for name, sign in terms) for i in ids]


def _read(step: Step) -> dict[str, dict[str, float]]:
    """Scores of one evaluation by category and item."""
    folder = storage.fetch(step.artifact.uri)
    found: dict[str, dict[str, float]] = {}
    for line in Path(folder, "samples.jsonl").read_text().splitlines():
        row = json.loads(line)
        found.setdefault(row["category"], {})[row["id"]] = row["score"]
    return found
