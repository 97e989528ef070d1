"""Curves of bounded size, however many rows a run has written.

Of each step and metric a few hundred points are kept: when there are twice as many, every second
one goes, and from then on only as many come in. A step made again after a fault replaces what it
said before.
"""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from bar_ray.types import OUTCOMES

MOST_POINTS = 400
CHARTED = (
    *("loss", "reward", "entropy", "kl", "gap", "grad_norm", "lr", "tokens_per_s", "mfu"),
    *("staleness", "staleness_max", "versions_mixed", "zero_variance", "truncated", "length"),
    *("importance", "importance_max", "importance_capped", "ratio_clipped", "canary_gap"),
    *("rollout_wait_s", "generate_s", "train_s", "sync_s", "seconds", "engines_idle"),
    *("requeued", "engines_lost", "graders_lost"),
    *(f"outcome/{name}" for name in OUTCOMES),
)
FIELDS = {name: name.replace("/", "__") for name in CHARTED}
Who = tuple[str, str, str]  # verb, name, fingerprint

Row = msgspec.defstruct(
    "Row",
    [
        *((name, str, "") for name in ("verb", "name", "fingerprint", "arm")),
        *((name, float, 0.0) for name in ("time", "eta_s")),
        *((name, int, 0) for name in ("step", "steps")),
        *((field, float | None, None) for field in FIELDS.values()),
    ],
    rename={field: name for name, field in FIELDS.items()},
)
_decoder = msgspec.json.Decoder(Row)


def rows(lines: bytes) -> Sequence[Any]:
    """Records of metrics.jsonl; lines that are none are left out."""
    try:
        return _decoder.decode_lines(lines)
    except msgspec.MsgspecError:
        return list(_one_by_one(lines))


def _one_by_one(lines: bytes) -> Iterator[Any]:
    """As earlier versions wrote them: with NaN, which is no JSON."""
    for line in lines.splitlines():
        try:
            found = json.loads(line, parse_constant=lambda _: None)
            yield msgspec.convert(found, Row, strict=False)
        except (ValueError, msgspec.MsgspecError):
            continue


class Curves:
    """The curves of one step."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.values: dict[str, list[float | None]] = {}
        self.stride, self.last = 1, None

    def add(self, row: Any) -> None:
        while self.steps and self.steps[-1] >= row.step:
            self._cut(len(self.steps) - 1)
        self.last = row
        if row.step % self.stride and row.step != row.steps:
            return
        self.steps.append(row.step)
        for name, field in FIELDS.items():
            value = getattr(row, field)
            if value is not None and name not in self.values:
                self.values[name] = [None] * (len(self.steps) - 1)
            if name in self.values:
                self.values[name].append(value)
        if len(self.steps) >= 2 * MOST_POINTS:
            self._thin()

    def _cut(self, length: int) -> None:
        del self.steps[length:]
        for values in self.values.values():
            del values[length:]

    def _thin(self) -> None:
        self.stride *= 2
        kept = [place for place, step in enumerate(self.steps) if step % self.stride == 0]
        self.steps = [self.steps[place] for place in kept]
        for name, values in self.values.items():
            self.values[name] = [values[place] for place in kept]

    def points(self) -> dict[str, list[tuple[int, float]]]:
        """(step, value) by metric, with the newest row whatever the stride."""
        found = {
            name: [(s, v) for s, v in zip(self.steps, values, strict=True) if v is not None]
            for name, values in self.values.items()
        }
        if self.last is not None and self.steps and self.steps[-1] != self.last.step:
            for name, line in found.items():
                value = getattr(self.last, FIELDS[name])
                if value is not None:
                    line.append((self.last.step, value))
        return found
