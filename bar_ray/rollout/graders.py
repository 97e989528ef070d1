"""Grading in actors of their own: a verifier that hangs or dies takes nothing else with it.

Each grader holds a sandbox and a few verifier processes; both end with it. One that is late or gone
is replaced and what it was grading is graded again.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import ray

from bar_ray import rewards
from bar_ray.recipe import Rollout, Sandbox
from bar_ray.rollout.calls import LOST, answer
from bar_ray.types import Verdict

GRADE_S = 300.0
AT_ONCE = 8  # groups in one grader; its sandbox slots decide how many programs run

Item = tuple[str, Any, str]  # completion, ground truth, reward name


class Grader:
    """The actor: rewards behind one call."""

    def __init__(self, settings: Sandbox) -> None:
        self.sandbox = rewards.sandbox_for(settings)

    def grade(self, items: Sequence[Item]) -> list[Verdict]:
        return rewards.grade(items, self.sandbox)


class Graders:
    """A few graders; each batch of items goes to the least busy one."""

    def __init__(self, rollout: Rollout, sandbox: Sandbox, report: Callable[..., None]) -> None:
        self.rollout, self.sandbox, self.report = rollout, sandbox, report
        self.busy: dict[Any, int] = {}
        self.names: dict[Any, str] = {}
        self.num_lost = 0
        self._numbers = itertools.count()

    def start(self) -> None:
        for _ in range(self.rollout.graders):
            self._add()

    async def close(self) -> None:
        for actor in [*self.busy]:
            self._remove(actor)

    def _add(self) -> None:
        options = {"num_cpus": 0, "max_concurrency": AT_ONCE}
        actor = ray.remote(Grader).options(**options).remote(self.sandbox)
        self.busy[actor], self.names[actor] = 0, f"grader {next(self._numbers)}"

    def _remove(self, actor: Any) -> None:
        self.busy.pop(actor, None)
        ray.kill(actor)

    async def grade(self, items: Sequence[Item]) -> list[Verdict]:
        """A verdict for each item."""
        while True:
            actor = min(self.busy, key=self.busy.__getitem__)
            self.busy[actor] += 1
            try:
                return await answer(actor.grade.remote(items), GRADE_S, self.names[actor])
            except LOST as error:
                self._lose(actor, error)
            finally:
                if actor in self.busy:
                    self.busy[actor] -= 1

    def _lose(self, actor: Any, error: BaseException) -> None:
        if actor not in self.busy:
            return  # another call has seen to it
        self._remove(actor)
        self.num_lost += 1
        self.report("grader_lost", grader=self.names[actor], reason=str(error).splitlines()[-1])
        if self.num_lost > self.rollout.max_failures:
            raise error
        self._add()
