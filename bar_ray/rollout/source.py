"""Where a learner gets its batches: a live sampler, or rollouts kept earlier.

Both have the same calls, so a learner can be run alone on a recorded folder.
"""

import json
import time
from typing import Any

import ray
from ray.exceptions import RayActorError

from bar_ray import storage
from bar_ray.data.mixture import steps_of
from bar_ray.recipe import Rlvr
from bar_ray.rollout.calls import Late, Restarted, ask
from bar_ray.rollout.records import Group, RolloutBatch, describe
from bar_ray.types import UserError

OPEN_S = 900.0
ANSWER_S = 120.0
POLL_S = 30.0
RESTART_S = 2.0


class LiveRollouts:
    """A sampler actor seen from the learner.

    A sampler that is lost comes back empty (Ray restarts it): it is told where the line stood after
    the last batch and given the last weights, and samples what was waiting once more.
    """

    def __init__(self, sampler: Any, stage: Rlvr) -> None:
        self.sampler, self.stage = sampler, stage
        self.line: dict[str, Any] = {}
        self.num_batches = 0
        self.pushed: tuple[int, list[Any]] | None = None
        self.is_lost, self.num_lost = False, 0

    def open(self) -> int:
        """The number of optimizer steps, once prompts are read."""
        return self._wait(lambda: self.sampler.open.remote())

    def start(self, line: dict[str, Any], num_batches: int) -> None:
        """Take up the line where a checkpoint left it."""
        self.line, self.num_batches = line, num_batches
        self._wait(lambda: self.sampler.restore.remote(line, num_batches))

    def batch(self, step: int) -> RolloutBatch:
        found: RolloutBatch = self._wait(lambda: self.sampler.batch.remote(step))
        self.line, self.num_batches = found.line, step + 1
        return found

    def push(self, version: int, weights: list[Any], fresh: bool = False) -> float:
        self.pushed = version, weights or (self.pushed[1] if self.pushed else [])
        return self._wait(lambda: self.sampler.push.remote(version, weights, fresh))

    def logprobs(self, sequences: list[list[int]], starts: list[int]) -> dict[str, Any]:
        return self._wait(lambda: self.sampler.logprobs.remote(sequences, starts))

    def digests(self) -> dict[str, dict[str, str]]:
        return self._wait(lambda: self.sampler.digests.remote())

    def state(self) -> dict[str, Any]:
        return self._wait(lambda: self.sampler.state.remote())

    def begin_score(self) -> Any:
        """Start scoring the held-out prompts; `end_score` takes what this returns."""
        return self.sampler.score.remote()

    def end_score(self, begun: Any) -> dict[str, float]:
        refs = [begun]
        return self._wait(lambda: refs.pop() if refs else self.sampler.score.remote())

    def _wait(self, call: Any) -> Any:
        """The answer of the sampler, however long it works; not if it is silent, not if it dies."""
        while True:
            try:
                if self.is_lost:
                    self._revive()
                return self._answer(call())
            except (RayActorError, Restarted):
                self.num_lost += not self.is_lost
                self.is_lost = True
                if self.num_lost > self.stage.rollout.max_failures:
                    raise
                time.sleep(RESTART_S)  # Ray starts it again

    def _answer(self, ref: Any) -> Any:
        while not ray.wait([ref], timeout=POLL_S)[0]:
            try:
                ask(self.sampler.ping.remote(), ANSWER_S, "the sampler")
            except Late:
                ray.kill(self.sampler, no_restart=False)
        return ray.get(ref)

    def _revive(self) -> None:
        ask(self.sampler.open.remote(), OPEN_S, "the new sampler")
        self.sampler.lost.remote()
        ask(self.sampler.restore.remote(self.line, self.num_batches), OPEN_S, "the new sampler")
        if self.pushed is not None:
            ask(self.sampler.push.remote(*self.pushed, False), OPEN_S, "the new sampler")
        self.is_lost = False


class KeptRollouts:
    """Rollouts that an earlier run kept (`rollout.dump_every=1`), step by step."""

    def __init__(self, uri: str, stage: Rlvr) -> None:
        self.uri, self.stage = uri, stage

    def open(self) -> int:
        kept = len([f for f in storage.list_files(self.uri) if ".jsonl" in f])
        wanted = steps_of(self.stage.steps, self.stage.epochs, self.stage.batch_size, 0)
        if kept < wanted or not kept:
            raise UserError(f"{self.uri} holds the rollouts of {kept} steps; {wanted} are needed")
        return wanted

    def batch(self, step: int) -> RolloutBatch:
        lines = storage.read_bytes(storage.join(self.uri, kept_name(step))).splitlines()
        drawn = [Group.from_json(json.loads(line)) for line in lines]
        return RolloutBatch(step, drawn, describe(drawn, step), {})

    def start(self, line: dict[str, Any], num_batches: int) -> None: ...

    def push(self, version: int, weights: list[Any], fresh: bool = False) -> float:
        return 0.0

    def logprobs(self, sequences: list[list[int]], starts: list[int]) -> dict[str, Any]:
        return {}

    def digests(self) -> dict[str, dict[str, str]]:
        return {}

    def state(self) -> dict[str, Any]:
        return {}


def kept_name(step: int) -> str:
    """The file of one step's rollouts."""
    return f"step-{step:08d}.jsonl"
