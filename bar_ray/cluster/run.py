"""One run: what every verb is given beside its step, and the loop that executes a plan.

The driver holds values only. Each step runs as a Ray task on the driver's node (never on a spot
node) and starts its own workers; independent steps run at the same time as far as the pool allows.
"""

import contextlib
import importlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bar_ray import storage
from bar_ray.cluster.journal import Journal
from bar_ray.cluster.lease import Lease
from bar_ray.cluster.pace import Pace
from bar_ray.cluster.pool import Standing, demand_of, holder
from bar_ray.cluster.quota import Demand, missing
from bar_ray.cluster.sharing import PoolClient
from bar_ray.graph import VERBS, Planned, Step, key, shape_of, topological
from bar_ray.log import duration, some, titled
from bar_ray.recipe import Recipe, meaning
from bar_ray.types import UserError, user_error_in

POLL_S = 0.5
DECLARE_EVERY_S = 2.0  # when nothing has begun or ended
SAY_WAITING_EVERY_S = 30.0
VIEW_EVERY_S = 5.0
EVALUATED = 16  # at most so many models by the same engines
IN_A_ROW = {verb for verb, (function, _) in VERBS.items() if ".stages.start:" in function}


@dataclass(frozen=True)
class Run:
    """Travels with every step: the recipe's machinery and the journal."""

    run_id: str
    recipe: Recipe
    journal: Any
    head: str

    @classmethod
    def start(cls, recipe: Recipe, run_id: str) -> "Run":
        """Bring up the journal on this node."""
        head = ray.get_runtime_context().get_node_id()
        here = NodeAffinitySchedulingStrategy(head, soft=False)
        options = {"scheduling_strategy": here, "max_restarts": -1}
        journal = Journal.options(**options).remote(recipe.storage, run_id, recipe.tracking)
        return cls(run_id, recipe, journal, head)

    def fetch(self, step: Step) -> str:
        """A local, verified folder with the output of a step."""
        return storage.fetch(step.artifact.uri)

    @staticmethod
    def locate(step: Step, name: str, suffixes: tuple[str, ...] = ("",)) -> str:
        """The URI of a dataset of the step; `INPUT:path` lies in the artifact of an input."""
        uri, content = step.data[name]
        place, _, path = uri.partition(":")
        if place in step.inputs:
            artifact = step.inputs[place].artifact.uri  # workers of other nodes read it too
            return storage.join(artifact, storage.verify(artifact).data, path)
        if storage.fingerprint_files(uri, suffixes) != content:
            raise UserError(f"{uri} has changed since this run was planned; run the command again")
        return uri

    @contextlib.contextmanager
    def output(self, step: Step, info: dict[str, Any] | None = None) -> Iterator[str]:
        """A folder to write the step's output to; committed as an artifact at the end.

        `info` may be filled inside the block: it goes into the manifest with the lineage.
        """
        extra = {} if info is None else info
        output = storage.scratch(storage.staging_folder(step.storage_uri))
        try:
            with storage.unless_full("write to", output):
                yield output
            lineage = {
                "verb": step.verb,
                "name": step.name,
                "fingerprint": step.fingerprint,
                "settings": meaning(step.settings),
                "inputs": {k: s.artifact.fingerprint for k, s in step.inputs.items()},
                "data": dict(step.data),
            }
            storage.commit(output, step.artifact.uri, {**lineage, **extra})
        finally:
            storage.discard(output)

    def event(self, event: str, step: Step, **fields: Any) -> None:
        who = {"verb": step.verb, "name": step.name, "fingerprint": step.fingerprint}
        who |= {"arm": step.arm} if step.arm else {}
        self.journal.event.remote(event, **who, **fields)

    def transcript(self, step: Step, /, **fields: Any) -> None:  # a field may be named `step`
        who = {"verb": step.verb, "name": step.name, "fingerprint": step.fingerprint}
        self.journal.transcript.remote(**who, **fields)

    def say(self, step: Step, line: str) -> None:
        self.journal.say.remote(f"{titled(step.name, step.arm):<10} | {step.verb:<8} | {line}")


@ray.remote(num_cpus=0, max_retries=3)
def run_steps(steps: list[Step], run: Run) -> dict[str, str]:
    """Run one verb in a process of its own; should that die, another one goes on.

    Returns the mistakes of users that concern one of several steps, by the step's key.
    """
    todo = [step for step in steps if storage.read_manifest(step.artifact.uri) is None]
    try:
        module, name = VERBS[steps[0].verb][0].split(":")
        function = getattr(importlib.import_module(module), name)
        if steps[0].verb in {"evaluate", *IN_A_ROW}:
            return function(todo, run) or {}
        for step in todo:
            function(step, run)
        return {}
    except Exception as error:
        # Ray wraps what went wrong in a worker, and the chain of causes is lost on the way out.
        if mistake := user_error_in(error):
            raise mistake from error
        raise


def kind_of(step: Step) -> tuple[Any, ...]:
    """Equal for steps that the same processes can make, one after the other."""
    if step.verb in IN_A_ROW:
        return VERBS[step.verb][0], step.settings["stage"].run
    shape = shape_of(step.inputs["model"]) if step.verb == "evaluate" else ()
    contents = [content for _, content in step.data.values()]
    return step.verb, meaning(step.settings), contents, shape


def most_together(step: Step) -> int:
    """How many steps of its kind the same processes may make.

    Not those of an elastic training: the pool gives and takes workers for one step.
    """
    if step.verb not in IN_A_ROW:
        return EVALUATED if step.verb == "evaluate" else 1
    settings = step.settings["stage"].run
    return settings.together if settings.fewest_workers == settings.num_workers else 1


class StepFailed(UserError):
    """One or more steps failed; everything finished is kept."""


def execute(planned: list[Planned], run: Run, lease: Lease) -> None:
    """Run what is not reused, inputs first, independent steps at the same time.

    A failed step stops only what depends on it. At the end a `StepFailed` names every failure.
    """
    Executor(planned, run, lease).loop()


class Executor:
    """The driver's loop over the plan."""

    def __init__(self, planned: list[Planned], run: Run, lease: Lease) -> None:
        self.run, self.lease = run, lease
        self.pool = PoolClient(create=True)
        self.todo = {key(p.step): p.step for p in planned if not p.reused}
        self.waits_for = {
            place: {key(s) for s in topological([step])} - {place}
            for place, step in self.todo.items()
        }
        self.total, self.done, self.pace = len(self.todo), 0, Pace()
        self.running: dict[Any, tuple[list[Step], float]] = {}  # the first one holds of the pool
        self.waiting: set[str] = set()
        self.alone: set[str] = set()  # failed together with others, and are tried again
        self.declared: tuple[set[str], float] = (set(), 0.0)  # what, when
        self.held: dict[str, dict[str, int]] = {}  # as last entered into the journal
        self.failures: list[str] = []
        self.said_waiting = self.viewed = time.monotonic()
        # Ray Train's helpers look for "the" cluster of the machine and give up when there are two.
        self.env = {"env_vars": {"RAY_ADDRESS": ray.get_runtime_context().gcs_address}}
        for p in planned:
            if p.reused:
                run.event("reused", p.step)

    def loop(self) -> None:
        try:
            self._loop()
        finally:
            self.pool.ask("leave", self.run.run_id)
            self.run.journal.pool.remote({"steps": []})

    def _loop(self) -> None:
        while self.todo or self.running:
            self.lease.check()
            self._share_pool()
            self._show()
            if self.running:
                done, _ = ray.wait(list(self.running), timeout=POLL_S)
            elif self._ready():  # another run has the pool
                done = []
                time.sleep(POLL_S)
            else:
                break  # what is left depends on something that failed
            for ref in done:
                self._finish(ref)
            self._say_waiting()
        self._show()
        if self.failures:
            raise StepFailed("\n".join(self.failures))

    def _ready(self) -> list[Step]:
        """Steps whose inputs are there, those that most steps wait for first."""
        unfinished = self._unfinished()
        ready = [s for place, s in self.todo.items() if not self.waits_for[place] & unfinished]
        return sorted(ready, key=lambda step: -self._num_dependents(step))

    def _unfinished(self) -> set[str]:
        at_work = (key(step) for steps, _ in self.running.values() for step in steps)
        return {*self.todo, *at_work}

    def _num_dependents(self, step: Step) -> int:
        return sum(key(step) in waits for waits in self.waits_for.values())

    def _share_pool(self) -> None:
        """Declare what runs and what waits; start what the pool lets in."""
        ready, holding = self._ready(), [steps[0] for steps, _ in self.running.values()]
        state = {key(step) for step in (*ready, *holding)}
        if state == self.declared[0] and time.monotonic() - self.declared[1] < DECLARE_EVERY_S:
            return
        self.declared = state, time.monotonic()
        waiting = [self._demand(step) for step in ready]
        running = [self._demand(step) for step in holding]
        run_id, resize_s = self.run.run_id, self.run.recipe.cluster.resize_s
        answer = self.pool.ask("declare", run_id, running, waiting, resize_s, default={})
        standings = {key(step): answer.get(holder(run_id, step)) for step in ready}
        allowed = [s for s in ready if (known := standings[key(s)]) and known.may_run]
        for step in allowed:
            if key(step) in self.todo:  # not yet begun together with one before it
                self._start(self._together(step, ready, allowed), standings[key(step)])
        for step in ready:
            if key(step) in self.todo:
                self._wait_aloud(step)
        for step in holding:
            if standing := answer.get(holder(run_id, step)):
                self._note_size(step, standing)
        if time.monotonic() - self.viewed > VIEW_EVERY_S:
            self.viewed = time.monotonic()
            if view := self.pool.ask("view"):
                self.run.journal.pool.remote(view)

    def _demand(self, step: Step) -> Demand:
        return demand_of(step, self.run.run_id, self.run.recipe)

    def _together(self, step: Step, ready: list[Step], allowed: list[Step]) -> list[Step]:
        """The step, what waits for it alone, and its part of those like it that are ready."""
        most = most_together(step)
        if most == 1 or key(step) in self.alone:
            return [step]

        kind, leading = kind_of(step), set(map(key, allowed))
        alike = [s for s in ready if self._is_free(s) and kind_of(s) == kind]
        others = [s for s in alike if key(s) not in leading]
        part = math.ceil(len(alike) / (len(alike) - len(others)))
        group = [step]
        for other in (None, *others[: part - 1]):
            group += [other] if other and len(group) < most else []
            while len(group) < most and (follower := self._follower(group)):
                group.append(follower)
        return group

    def _is_free(self, step: Step) -> bool:
        return key(step) in self.todo and key(step) not in self.alone

    def _follower(self, group: list[Step]) -> Step | None:
        """A step that the same processes can make as soon as they have made the group."""
        if group[0].verb not in IN_A_ROW or group[0].settings["stage"].run.num_workers > 1:
            return None  # other ranks would look for what the first one still writes
        kind, mine, unfinished = kind_of(group[0]), set(map(key, group)), self._unfinished()
        return next(
            (
                step
                for place, step in self.todo.items()
                if place not in mine
                and self._is_free(step)
                and self.waits_for[place] & unfinished
                and self.waits_for[place] & unfinished <= mine
                and kind_of(step) == kind
            ),
            None,
        )

    def _start(self, steps: list[Step], standing: Standing) -> None:
        here = NodeAffinitySchedulingStrategy(self.run.head, soft=False)
        name = f"{steps[0].verb}-{steps[0].name}"
        ref = run_steps.options(name=name, scheduling_strategy=here, runtime_env=self.env).remote(
            steps, self.run
        )
        self.running[ref] = (steps, time.monotonic())
        resources = self._demand(steps[0]).resources(standing.held)
        for step in steps:
            del self.todo[key(step)]
            self.run.event("started", step, held=standing.held, resources=resources)
            self.held[key(step)] = standing.held
            resources = {}  # the others are in the processes of the first

    def _wait_aloud(self, step: Step) -> None:
        """Enter into the journal since when a step could run if there were room."""
        if key(step) not in self.waiting:
            self.waiting.add(key(step))
            self.run.event("waiting", step)

    def _note_size(self, step: Step, standing: Standing) -> None:
        """Enter into the journal how many processes an elastic step has."""
        held = standing.held
        if held and held != self.held[key(step)]:
            self.held[key(step)] = held
            resources = self._demand(step).resources(held)
            self.run.event("resized", step, held=held, resources=resources)

    def _finish(self, ref: Any) -> None:
        steps, started = self.running.pop(ref)
        seconds = time.monotonic() - started
        try:
            mistakes = ray.get(ref)
        except (RayError, UserError) as error:
            if len(steps) > 1:  # one of them must not cost the others
                self.todo |= {key(step): step for step in steps}
                self.alone |= {key(step) for step in steps}
                return
            mistakes = {key(steps[0]): reason_of(error)}
        for step in steps:
            self.pace.note(step.verb, seconds / len(steps))
            self._conclude(step, seconds, mistakes.get(key(step), ""))

    def _conclude(self, step: Step, seconds: float, mistake: str) -> None:
        if mistake:
            self.failures.append(f"{step.label}: {mistake}")
            self.run.event("failed", step, seconds=seconds, reason=mistake)
            self._drop_dependents(step)
            print(f"failed    {step.label}: {mistake}", flush=True)
        else:
            self.done += 1
            self.run.event("finished", step, seconds=seconds)
            place = f"{self.done}/{self.total}{self._eta()}"
            print(f"finished  {step.label} in {duration(seconds)} ({place})", flush=True)

    def _eta(self) -> str:
        at_work = [step for steps, _ in self.running.values() for step in steps]
        seconds = self.pace.eta(step.verb for step in (*self.todo.values(), *at_work))
        return f", eta {duration(seconds)}" if seconds else ""

    def _drop_dependents(self, failed: Step) -> None:
        for place in [p for p in self.todo if key(failed) in self.waits_for[p]]:
            del self.todo[place]

    def _say_waiting(self) -> None:
        """Nothing waits in silence."""
        if time.monotonic() - self.said_waiting < SAY_WAITING_EVERY_S:
            return
        self.said_waiting = time.monotonic()
        running = ", ".join(s.label for steps, _ in self.running.values() for s in steps)
        waiting = [step.label for step in self._ready()]
        if waiting:
            print(f"running {running}; waiting for the pool: {some(waiting)}", flush=True)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        for (step, *_), _ in self.running.values():
            if lacking := missing(nodes, self._demand(step)):
                print(f"{step.label} asks for more than the cluster has: {lacking}", flush=True)

    def _show(self) -> None:
        with contextlib.suppress(RayActorError):  # being started again
            for line in ray.get(self.run.journal.drain.remote()):
                print(line, flush=True)


def reason_of(error: BaseException) -> str:
    """The message for a person: the user's error inside, or the innermost cause in one line."""
    if mistake := user_error_in(error):
        return str(mistake)
    while cause := getattr(error, "cause", None) or error.__cause__:
        error = cause
    lines = str(error).strip().splitlines() or [""]
    # Ray's own errors end with what went wrong, others begin with it.
    of_ray = type(error).__module__.startswith("ray.")
    return f"{type(error).__name__}: {lines[-1 if of_ray else 0]}"
