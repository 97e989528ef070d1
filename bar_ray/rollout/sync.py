"""Weights from the learner to the engines, and the proof that they arrived.

A push can go wrong in silence: a tensor left out, an old one sent, half a fused layer. After each
one, learner and engines compute the log-probabilities of the same tokens (the canary). Where they
disagree, checksums name the tensors, everything is pushed once more, and if that does not help
either the run stops: nothing is learned from samples of an unknown model.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import ray

from bar_ray.rollout.weights import Tensors, tensor_digest
from bar_ray.types import UserError

NUM_CANARIES = 8


class CanaryError(UserError):
    """Learner and engines disagree about the same tokens: something is wrong with the weights."""


@dataclass(frozen=True)
class Canary:
    """A sequence whose tokens from `start` on are compared."""

    tokens: list[int]
    start: int


@dataclass
class WeightSync:
    """One learner's weights in all engines.

    Args:
        rollouts: has `push(version, weights, fresh)` (seconds), `logprobs` and `digests` by engine.
        changed, everything: the tensors that training moves, in whole fused layers, and all of
            them, under their names on disk.
        logprobs: the learner's own log-probabilities (temperature 1) of canaries, by canary.
        tolerance: largest mean absolute difference per token.
        report: called as `report(event, **fields)`.
    """

    rollouts: Any
    changed: Callable[[], Tensors]
    everything: Callable[[], Tensors]
    logprobs: Callable[[list[Canary]], list[list[float]]]
    tolerance: float
    report: Callable[..., None]
    canaries: list[Canary] = field(default_factory=list)

    def push(self, version: int, fresh: bool = False) -> dict[str, float]:
        """Send what training has changed; returns seconds and bytes."""
        return self._send(self.changed(), version, fresh)

    def synchronise(self, version: int) -> dict[str, float]:
        """Push, compare, repair once; `CanaryError` when engines still differ."""
        sent = self.push(version)
        gap = self.gap()
        if gap > self.tolerance:
            wrong = self.wrong_tensors()
            self.report("weights_differ", version=version, gap=gap, tensors=wrong)
            sent = self._send(self.everything(), version, fresh=True)
            repaired = self.gap()
            if repaired > self.tolerance:
                raise CanaryError(
                    f"after the weight push of step {version} the engines' log-probabilities are "
                    f"{gap:.3g} away from the learner's on average, and {repaired:.3g} after "
                    f"pushing everything again; at most {self.tolerance} is allowed "
                    f"(rlvr.grpo.canary_tolerance). Tensors that differ: {wrong or 'none by sum'}. "
                    "Nothing was learned from their samples"
                )
            self.report("weights_repaired", version=version, gap=repaired)
            gap = repaired
        return {**sent, "canary_gap": gap}

    def gap(self) -> float:
        """The mean absolute difference per token to the engine that differs most."""
        if not self.canaries:
            return 0.0
        ours = [x for row in self.logprobs(self.canaries) for x in row]
        by_engine = self.rollouts.logprobs(
            [canary.tokens for canary in self.canaries], [canary.start for canary in self.canaries]
        )
        gaps = []
        for rows in by_engine.values():
            theirs = [x for row in rows for x in row]
            mean = fmean(abs(a - b) for a, b in zip(ours, theirs, strict=True))
            gaps.append(math.inf if math.isnan(mean) else mean)  # NaN compares as equal to anything
        return max(gaps, default=0.0)

    def wrong_tensors(self) -> list[str]:
        """Tensors that some engine was not given as they are now, by checksum."""
        ours = {name: tensor_digest(array) for name, array in self.changed().items()}
        given = self.rollouts.digests().values()
        return sorted({n for each in given for n, sum_ in ours.items() if each.get(n) != sum_})

    def _send(self, tensors: Tensors, version: int, fresh: bool) -> dict[str, float]:
        size = sum(array.nbytes for array in tensors.values())
        seconds = self.rollouts.push(version, [ray.put(tensors)], fresh)
        return {"sync_s": seconds, "sync_mb": size / 1e6}
