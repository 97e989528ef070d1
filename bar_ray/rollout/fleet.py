"""The rollout engines of one stage: started, watched, replaced, kept at the learner's weights.

One actor and one placement group per engine, so that each can be lost, replaced, added or removed
alone while the others generate. The groups belong to the actor this runs in: Ray removes them, and
the engines with them, when it dies.
"""

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import ray
from ray.exceptions import ObjectLostError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import (
    NodeAffinitySchedulingStrategy,
    PlacementGroupSchedulingStrategy,
)

from bar_ray.cluster.pool import bundle_of_engine
from bar_ray.recipe import Rollout
from bar_ray.rollout.calls import LOST, Late, answer
from bar_ray.rollout.engine import RolloutEngine, Sample, Sampling
from bar_ray.rollout.launch import EngineOptions

SAY_EVERY_S = 30.0
START_S = 600.0
END_S = 15.0


class FleetError(RuntimeError):
    """Engines are lost faster than replacing them makes sense."""


@dataclass
class Member:
    """One engine. `process` is (node id, process id) of its actor, once it has answered."""

    number: int
    group: PlacementGroup
    actor: Any
    process: tuple[str, int] | None = None
    ready: bool = False
    version: int = -1  # of the weights it was given; -1: none yet
    busy: int = 0  # groups it is generating
    pushing: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def name(self) -> str:
        return f"engine {self.number}"


class Fleet:
    """Engines that serve one model folder with the weights pushed last.

    Args:
        folder: Hugging Face folder that every engine starts from.
        report: called as `report(event, **fields)` for what a reader of the run should know.
    """

    def __init__(
        self,
        rollout: Rollout,
        options: EngineOptions,
        folder: str,
        name: str,
        report: Callable[..., None],
    ) -> None:
        self.rollout, self.options, self.folder = rollout, options, folder
        self.name, self.report = name, report
        self.members: list[Member] = []
        self.version, self.weights = 0, []  # what every engine must have before it serves
        self.num_lost = 0
        self.failure: BaseException | None = None
        self._numbers = itertools.count()
        self._changed = asyncio.Condition()  # an engine became ready, idle or hopeless
        self._tasks: set[asyncio.Task[None]] = set()
        self._endings: set[asyncio.Task[None]] = set()
        self._closing = False

    def __str__(self) -> str:
        return ", ".join(
            f"{m.name} ({m.busy} prompts)" if m.ready else f"{m.name} (starting)"
            for m in self.members
        )

    # --- the engines -----------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to start the engines; calls that need one wait until it is ready."""
        self.resize(self.rollout.fewest_engines)
        self._spawn(self._watch())

    def resize(self, num_engines: int) -> None:
        """Add or remove engines; prompts of a removed one are given to the others."""
        for _ in range(num_engines - len(self.members)):
            self._add()
        for member in self.members[num_engines:]:
            self._remove(member)

    def remove_leftovers(self) -> None:
        """Remove placement groups of a fleet of this name whose actor was lost and came back.

        Ray removes them only when it is gone for good.
        """
        for record in ray.util.placement_group_table().values():
            is_ours = record["name"].startswith(f"{self.name}-")
            if is_ours and record["state"] != "REMOVED":
                remove_placement_group(ray.util.get_placement_group(record["name"]))

    async def close(self) -> None:
        """End every engine with its processes, and remove the groups."""
        self._closing = True
        for task in self._tasks:
            task.cancel()
        ending = [self._end(member, gently=True) for member in self.members]
        await asyncio.gather(*ending, *self._endings)

    def _add(self) -> None:
        number = next(self._numbers)
        bundle = bundle_of_engine(self.rollout)
        group = placement_group([bundle], name=f"{self.name}-{number}")
        actor = (
            ray.remote(RolloutEngine)
            .options(
                num_cpus=self.rollout.cpus_per_engine,
                num_gpus=self.rollout.gpus_per_engine,
                resources=self.rollout.resources,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group),
            )
            .remote(self.folder, self.options)
        )
        member = Member(number, group, actor)
        self.members.append(member)
        self._spawn(self._make_ready(member, bundle))

    async def _make_ready(self, member: Member, bundle: dict[str, float]) -> None:
        try:
            await self._placed(member, bundle)
            health = await self._ask(member, "health", START_S)
            member.process = health.node_id, health.process_id
            while member.version != self.version:
                await self._catch_up(member)
        except LOST as error:
            await self._lose(member, error)
            return
        member.ready = True
        self.report("engine_ready", engine=member.number, version=self.version)
        await self._notify()

    async def _catch_up(self, member: Member) -> None:
        """Give a new engine the weights pushed last."""
        weights = self.weights
        try:
            await self._push_to(member, weights, fresh=False)
        except ObjectLostError:  # with the learner that held them; the next one brings its own
            await self._until(lambda: self.weights is not weights)

    async def _placed(self, member: Member, bundle: dict[str, float]) -> None:
        """Wait for the engine's placement group, aloud."""
        ready, started = asyncio.wrap_future(member.group.ready().future()), time.monotonic()
        while not (await asyncio.wait([ready], timeout=SAY_EVERY_S))[0]:
            self.report(
                "waiting",
                message=f"{self.name}: {member.name} waits {time.monotonic() - started:.0f} s "
                f"for a place of {bundle}",
            )

    async def _watch(self) -> None:
        """Ask every engine for a sign of life; one that gives none is replaced."""
        while True:
            await asyncio.sleep(self.rollout.silence_s / 4)
            await asyncio.gather(*(self._check(m) for m in self.members if m.ready))

    async def _check(self, member: Member) -> None:
        try:
            await self._ask(member, "health", self.rollout.silence_s)
        except LOST as error:
            await self._lose(member, error)

    async def _lose(self, member: Member, error: BaseException) -> None:
        """Replace an engine that is gone, silent or unfit, as often as the recipe allows."""
        if member not in self.members or self._closing:
            return
        self.num_lost += 1
        reason = str(error).strip().splitlines()[-1]
        self.report("engine_lost", engine=member.number, reason=reason)
        self._remove(member)
        if self.num_lost > self.rollout.max_failures:
            await self._give_up(
                FleetError(
                    f"{self.num_lost} engines were lost, the last: {member.name}: {reason}. "
                    "At most rollout.max_failures are replaced"
                )
            )
        else:
            self._add()

    async def _give_up(self, error: BaseException) -> None:
        self.failure = error
        await self._notify()

    def _remove(self, member: Member) -> None:
        """Take an engine out of service; its end goes on by itself."""
        self.members.remove(member)
        task = asyncio.ensure_future(self._end(member))
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _end(self, member: Member, gently: bool = False) -> None:
        if gently:
            with contextlib.suppress(*LOST):
                await self._ask(member, "shutdown", END_S)
        ray.kill(member.actor)
        remove_placement_group(member.group)
        if member.process is not None:
            # A stopped process does not hear Ray's word.
            node_id, process_id = member.process
            here = NodeAffinitySchedulingStrategy(node_id, soft=False)
            end = end_process.options(scheduling_strategy=here).remote(process_id)
            with contextlib.suppress(Late, ray.exceptions.RayError):
                await answer(end, END_S, f"the node of {member.name}")

    # --- what they do ----------------------------------------------------------------------------

    async def generate(self, tokens: list[int], sampling: Sampling) -> list[Sample]:
        """Completions of one prompt by the least busy engine; by another one if that is lost."""
        while True:
            member = await self._least_busy()
            member.busy += 1
            try:
                limit = self.rollout.generate_s
                [samples] = await self._ask(member, "generate", limit, [tokens], sampling)
                return samples
            except LOST as error:
                await self._lose(member, error)
            finally:
                member.busy -= 1
                await self._notify()

    async def push(self, version: int, weights: Any, fresh: bool = False) -> None:
        """Give every engine these weights; one that cannot take them is replaced.

        `weights` is a list of one reference to arrays: passed on as it is, nothing is copied here.
        An empty list changes the version only. Engines that start later are given the weights
        pushed last before they serve.
        """
        self.version, self.weights = version, weights or self.weights
        await self._notify()
        members = [member for member in self.members if member.ready]
        await asyncio.gather(*(self._push_and_care(m, weights, fresh) for m in members))

    async def _push_and_care(self, member: Member, weights: list[Any], fresh: bool) -> None:
        try:
            await self._push_to(member, weights, fresh)
        except LOST as error:
            await self._lose(member, error)

    async def _push_to(self, member: Member, weights: list[Any], fresh: bool) -> None:
        async with member.pushing:
            version, limit = self.version, self.rollout.sync_s
            if weights:
                await self._ask(member, "update_weights", limit, version, weights[0], fresh)
            else:
                await self._ask(member, "set_version", limit, version)
            member.version = version

    async def from_each(self, method: str, *arguments: Any) -> dict[str, Any]:
        """The answer of every engine that serves, by its name; waits for the first one."""
        while True:
            await self._until(lambda: any(m.ready for m in self.members))
            members = [member for member in self.members if member.ready]
            calls = [self._ask(m, method, self.rollout.sync_s, *arguments) for m in members]
            answers = await asyncio.gather(*calls, return_exceptions=True)
            found = {}
            for member, given in zip(members, answers, strict=True):
                if isinstance(given, LOST):
                    await self._lose(member, given)
                elif isinstance(given, BaseException):
                    raise given
                else:
                    found[member.name] = given
            if found:
                return found

    # --- waiting ---------------------------------------------------------------------------------

    async def _least_busy(self) -> Member:
        await self._until(lambda: any(m.ready for m in self.members))
        return min((m for m in self.members if m.ready), key=lambda m: m.busy)

    async def _until(self, condition: Callable[[], bool]) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.failure is not None or condition())
        if self.failure is not None:
            raise self.failure

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    async def _ask(self, member: Member, method: str, seconds: float, *arguments: Any) -> Any:
        ref = getattr(member.actor, method).remote(*arguments)
        return await answer(ref, seconds, f"{member.name} ({method})")

    def _spawn(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(self._guarded(work))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Awaitable[None]) -> None:
        """What goes wrong in the background is raised by the next call that waits."""
        try:
            await work
        except Exception as error:
            await self._give_up(error)


@ray.remote(num_cpus=0, max_retries=0)
def end_process(process_id: int) -> None:
    """Kill a process of this node that Ray's own kill may not have reached."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process_id, signal.SIGKILL)
