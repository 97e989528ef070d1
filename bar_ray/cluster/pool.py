"""The pool all experts share: who holds how many processes, who waits, who should have how many.

One actor (`sharing.py`) serves every driver of a cluster. Drivers declare what they run and what
waits, again and again; it answers what may start. A step is let in whole, engines and learners
together: two steps that each held one group while waiting for the other would wait for ever.
Elastic training runs are asked to shrink when another step is let in and to grow when there is
room, and a change waits for a checkpoint. All state but the counts follows from the declarations,
so a pool that is lost is replaced by an empty one.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bar_ray.cluster.quota import Counts, Demand, Group, Resources, Room, targets
from bar_ray.graph import Step
from bar_ray.recipe import Evaluate, Recipe, Rlvr, Rollout, Run, Stage

LIGHT: Resources = {"CPU": 1.0}  # steps that read, write and copy
SILENT_S = 60.0  # a driver that declares nothing for so long is gone
PATIENCE_S = 1800.0  # a change waits so long for a checkpoint: RLVR steps take minutes
HEADROOM = 1.25  # learners kept beyond those that the rollouts keep busy
NEARLY_BUSY = 0.05  # waiting less than this share of the time does not count


def holder(run_id: str, step: Step) -> str:
    """The name of a step in the pool."""
    return f"{run_id}/{step.verb}/{step.name}/{step.fingerprint}"


def demand_of(step: Step, run_id: str, recipe: Recipe) -> Demand:
    """What a step asks of the pool, all its processes together."""
    expert = recipe.experts.get(step.name)
    share = {"weight": expert.weight, "priority": expert.priority} if expert else {}
    return Demand(holder(run_id, step), step.label, groups_of(step), **share)


def groups_of(step: Step) -> dict[str, Group]:
    """The processes of a step. What grows first comes first: rollouts hold learners up."""
    settings = step.settings
    if isinstance(settings, Evaluate):
        bundle = bundle_of_engine(settings)
        return {"actors": Group(bundle, settings.num_engines, settings.num_engines)}
    stage = settings.get("stage") if isinstance(settings, dict) else None
    if not isinstance(stage, Stage):
        return {"step": Group(LIGHT, 1, 1)}
    run = stage.run
    workers = {"workers": Group(bundle_of_worker(run), run.fewest_workers, run.num_workers)}
    if not isinstance(stage, Rlvr) or stage.replay:
        return workers
    rollout = stage.rollout
    bundle = bundle_of_engine(rollout)
    return {"engines": Group(bundle, rollout.fewest_engines, rollout.num_engines), **workers}


def bundle_of_worker(run: Run) -> Resources:
    return _bundle(run.cpus_per_worker, run.gpus_per_worker, run.resources)


def bundle_of_engine(engine: Rollout | Evaluate) -> Resources:
    return _bundle(engine.cpus_per_engine, engine.gpus_per_engine, engine.resources)


def _bundle(cpus: float, gpus: float, others: Resources) -> Resources:
    return {kind: v for kind, v in {"CPU": cpus, "GPU": gpus, **others}.items() if v}


@dataclass
class Holding:
    """What the pool knows of a group of processes that is at work."""

    count: int
    since: float  # when it last changed
    starting: float | None = None  # since when it starts up
    start_s: float = 0.0  # how long that took
    left_s: float | None = None  # until the step ends, at its present pace; None before it trains
    busy: float | None = None  # how many of them rollouts keep busy; None: as many as there are
    change_since: float | None = None  # since when another count would be better
    saved: bool = False  # a checkpoint was made for the change


@dataclass
class Driver:
    """What one run has declared."""

    seen: float
    running: list[Demand] = field(default_factory=list)
    waiting: list[Demand] = field(default_factory=list)
    resize_s: float = 0.0


@dataclass(frozen=True)
class Standing:
    """The pool's answer about one step: whether it may run, and what it holds."""

    may_run: bool
    held: dict[str, int]


class Pool:
    """Every driver's steps on the nodes of one cluster.

    Args:
        nodes: the resources of each node that can be used.
        request: called with the processes that are wanted beyond those that are there, and with
            those that only the pool knows of; see `Autoscaler`.
    """

    def __init__(
        self,
        nodes: Callable[[], Sequence[Resources]],
        request: Callable[[list[Resources], list[Resources]], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.nodes, self.request, self.clock = nodes, request, clock
        self.drivers: dict[str, Driver] = {}
        self.holdings: dict[str, dict[str, Holding]] = {}
        self.targets: Counts = {}  # to have in the end
        self.grown: Counts = {}  # what each may have now, with the others as they are

    # --- drivers ---------------------------------------------------------------------------------

    def declare(
        self, run_id: str, running: list[Demand], waiting: list[Demand], resize_s: float
    ) -> dict[str, Standing]:
        """What a run has at work and what it would like to start, most urgent first."""
        now = self.clock()
        self.drivers[run_id] = Driver(now, running, waiting, resize_s)
        self.drivers = {r: d for r, d in self.drivers.items() if now - d.seen < SILENT_S}
        started = self._share_out()
        known = {demand.holder: demand for demand in [*running, *waiting]}
        return {
            name: Standing(name in started, self._counts(demand) if name in started else {})
            for name, demand in known.items()
        }

    def leave(self, run_id: str) -> None:
        """A run has ended."""
        self.drivers.pop(run_id, None)
        self._share_out()

    # --- training runs ---------------------------------------------------------------------------

    def take(self, name: str, group: str) -> int | None:
        """The number of processes to start with; None for a step that was not declared."""
        mine = self._holding(name, group)
        if mine is None:
            return None
        mine.count = self._demand(name).groups[group].low
        self._share_out()
        self._change(mine, self.grown[name][group])
        return mine.count

    def follow(self, name: str, group: str, count: int) -> int:
        """The number to have from now on, told by who starts and ends the processes."""
        mine = self._holding(name, group)
        if mine is None:
            return count
        mine.count = count
        self._share_out()
        goal = self._goal(name, group, mine)
        if goal == count:
            mine.change_since, mine.saved = None, False
            return count
        if mine.change_since is None:
            mine.change_since = self.clock()
        is_overdue = self.clock() - mine.change_since > PATIENCE_S
        if group != "workers" or mine.saved or is_overdue:
            self._change(mine, max(goal, count))
            return goal
        return count

    def wants_change(self, name: str, group: str, left_s: float, idle: float) -> bool:
        """Asked by the first process now and then: whether to save now, for another count.

        Args:
            left_s: seconds until the step ends at its present pace.
            idle: the share of its time that it waits for rollouts.
        """
        mine = self._holding(name, group)
        if mine is None:
            return False
        if mine.starting is not None:
            mine.start_s, mine.starting = self.clock() - mine.starting, None
        mine.left_s = left_s
        mine.busy = mine.count * (1 - idle) if idle > NEARLY_BUSY else None
        self._share_out()
        return not mine.saved and self._goal(name, group, mine) != mine.count

    def saved(self, name: str, group: str) -> None:
        """The checkpoint for a change is there."""
        mine = self._holding(name, group)
        if mine is not None:
            mine.saved = True

    def _goal(self, name: str, group: str, mine: Holding) -> int:
        """The count to go to now, if that is worth starting anew."""
        target, grown = self.targets[name][group], self.grown[name][group]
        if group != "workers":  # engines come and go one by one
            return target if target < mine.count else grown
        if target < mine.count:
            ends_soon = mine.left_s is not None and mine.left_s < mine.start_s
            return mine.count if ends_soon else target
        if grown == mine.count or mine.left_s is None:
            return mine.count
        gain = mine.left_s * (1 - mine.count / grown)
        driver = next(d for r, d in self.drivers.items() if name.startswith(f"{r}/"))
        is_early = self.clock() - mine.since < driver.resize_s
        return mine.count if is_early or gain < mine.start_s else grown

    def _change(self, mine: Holding, count: int) -> None:
        now = self.clock()
        mine.count, mine.since, mine.starting = count, now, now
        mine.change_since, mine.saved, mine.left_s = None, False, None

    def _holding(self, name: str, group: str) -> Holding | None:
        return self.holdings.get(name, {}).get(group)

    def _demand(self, name: str) -> Demand:
        return next(d for d in self._running() if d.holder == name)

    # --- sharing out -----------------------------------------------------------------------------

    def _running(self) -> list[Demand]:
        """Declared as at work, or let in since the driver's last declaration."""
        return [
            demand
            for driver in self.drivers.values()
            for demand in [
                *driver.running,
                *(d for d in driver.waiting if d.holder in self.holdings),
            ]
        ]

    def _share_out(self) -> set[str]:
        """Compute everybody's counts; returns who may run, among them those let in just now."""
        nodes, running = list(self.nodes()), self._running()
        self.holdings = {d.holder: self._held(d) for d in running}
        most = {d.holder: self._most(d) for d in running}
        waiting = self._waiting(nodes, running)
        shared = targets(nodes, running, waiting, most)
        room = Room(nodes)
        for demand in running:
            room.put_some(demand, self._counts(demand))
        for demand in shared.admitted or ([] if running else waiting[:1]):
            # Alone, even what does not fit may start: its processes make a cluster grow.
            if not room.put_all(demand, demand.at_least()) and running:
                break
            running.append(demand)
            self.holdings[demand.holder] = self._held(demand)
        self.targets = {d.holder: d.at_least() for d in running} | shared.counts
        self.grown = {d.holder: self._counts(d) for d in running}
        room.fill(running, self.grown, self.targets)
        self._ask_for_more(running, waiting, most)
        return {d.holder for d in running}

    def _held(self, demand: Demand) -> dict[str, Holding]:
        known = self.holdings.get(demand.holder)
        if known is None:
            now = self.clock()
            known = {group: Holding(low, now) for group, low in demand.at_least().items()}
        return known

    def _counts(self, demand: Demand) -> dict[str, int]:
        return {group: h.count for group, h in self.holdings[demand.holder].items()}

    def _most(self, demand: Demand) -> dict[str, int]:
        """The highest counts; learners that wait for rollouts need not be many."""
        most = {name: group.high for name, group in demand.groups.items()}
        learners = self.holdings[demand.holder].get("workers")
        if learners is not None and learners.busy is not None:
            enough = math.ceil(learners.busy * HEADROOM)
            most["workers"] = max(demand.groups["workers"].low, min(most["workers"], enough))
        return most

    def _waiting(self, nodes: Sequence[Resources], running: list[Demand]) -> list[Demand]:
        """Steps that wait: by priority, then of the run that has least, then as it ordered them."""
        room = Room(nodes)

        def share(driver: Driver) -> float:
            mine = {d.holder for d in driver.running}
            return sum(room.dominant_share(d, self._counts(d)) for d in running if d.holder in mine)

        line = [
            (-demand.priority, share(driver), number, demand)
            for number, driver in enumerate(self.drivers.values())
            for demand in driver.waiting
            if demand.holder not in self.holdings
        ]
        return [demand for *_, demand in sorted(line, key=lambda entry: entry[:3])]

    def _ask_for_more(
        self, running: list[Demand], waiting: list[Demand], most: Mapping[str, dict[str, int]]
    ) -> None:
        """Tell the autoscaler what is wanted; Ray Train and Ray Data tell it what they hold."""
        unknown = [
            demand.groups[name].bundle
            for demand in running
            for name, count in self._counts(demand).items()
            if name == "engines"
            for _ in range(count)
        ]
        beyond = []
        for demand in [*running, *(d for d in waiting if d.holder not in self.holdings)]:
            held = self._counts(demand) if demand.holder in self.holdings else {}
            for name, group in demand.groups.items():
                if name != "step":
                    high = most.get(demand.holder, {}).get(name, group.high)
                    beyond += [group.bundle] * (high - held.get(name, 0))
        self.request(unknown, beyond)

    # --- what people see -------------------------------------------------------------------------

    def view(self) -> dict[str, Any]:
        """Who holds what and who waits for what, as JSON."""
        running = {d.holder for d in self._running()}
        nodes = list(self.nodes())
        room = Room(nodes)
        rows = []
        for run_id, driver in self.drivers.items():
            for demand in [*driver.running, *driver.waiting]:
                is_running = demand.holder in running
                counts = self._counts(demand) if is_running else {}
                room.put_some(demand, counts)
                rows.append(
                    {
                        **{"run": run_id, "step": demand.label},
                        "state": "running" if is_running else "waiting",
                        **{"weight": demand.weight, "priority": demand.priority},
                        "groups": {
                            name: {
                                **{"bundle": group.bundle, "low": group.low, "high": group.high},
                                "held": counts.get(name, 0),
                                "target": self.targets.get(demand.holder, {}).get(name, 0),
                            }
                            for name, group in demand.groups.items()
                        },
                    }
                )
        return {"nodes": len(nodes), "total": _main(nodes), "free": _main(room.free), "steps": rows}


def _main(nodes: Sequence[Resources]) -> Resources:
    """CPUs, GPUs and custom resources of all nodes."""
    kinds = {kind for node in nodes for kind in node if not kind.startswith(("node:", "object_"))}
    total = {kind: sum(node.get(kind, 0.0) for node in nodes) for kind in sorted(kinds)}
    return {kind: round(v, 3) for kind, v in total.items() if kind != "memory"}


def render(view: dict[str, Any]) -> str:
    """The view as a table for people."""
    total, free = view["total"], view["free"]
    room = ", ".join(f"{free[kind]:g} of {amount:g} {kind}" for kind, amount in total.items())
    rows = [("step", "state", "processes", "wants", "of each", "weight", "priority")]
    for step in view["steps"]:
        for number, (name, group) in enumerate(step["groups"].items()):
            bundle = " ".join(f"{amount:g} {kind}" for kind, amount in group["bundle"].items())
            low, high = group["low"], group["high"]
            wants = f"{low} to {high}" if low < high else str(high)
            change = f" -> {group['target']}" if group["target"] != group["held"] else ""
            held = f"{group['held']}{change} {name}" if step["state"] == "running" else ""
            first = (step["step"], step["state"]) if not number else ("", "")
            share = (f"{step['weight']:g}", str(step["priority"])) if not number else ("", "")
            rows.append((*first, held, f"{wants} {name}", bundle, *share))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join([f"{view['nodes']} nodes, free: {room}", *lines])
