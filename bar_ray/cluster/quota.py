"""How steps share a pool: weighted dominant-resource fairness over whole processes.

Pure arithmetic, without Ray: nodes and demands in, counts out. A step asks for groups of equal
processes (training workers; engines), each with a number it cannot do without and a number beyond
which more is of no use. First every step at work gets the former, then steps that wait are let in
as far as theirs fits, then what is left goes, process by process, to the step with the highest
priority and the smallest dominant share for its weight (Ghodsi et al., NSDI 2011).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Resources = dict[str, float]
Counts = dict[str, dict[str, int]]  # holder -> group -> processes
ROUNDING = 1e-6


@dataclass(frozen=True)
class Group:
    """Equal processes of a step: `low` of them at least, up to `high`."""

    bundle: Resources
    low: int
    high: int


@dataclass(frozen=True)
class Demand:
    """What one step asks for. Of its groups, the first ones grow first."""

    holder: str
    label: str
    groups: Mapping[str, Group]
    weight: float = 1.0
    priority: int = 0

    def at_least(self) -> dict[str, int]:
        return {name: group.low for name, group in self.groups.items()}

    def resources(self, counts: Mapping[str, int]) -> Resources:
        """What so many processes take together."""
        return summed(times(self.groups[name].bundle, count) for name, count in counts.items())


class Room:
    """What is free on each node while processes are put there one by one."""

    def __init__(self, nodes: Iterable[Resources]) -> None:
        self.free = [dict(node) for node in nodes]
        self.total = summed(self.free)

    def put(self, bundle: Resources) -> bool:
        """Put a process on the fullest node that has room for it."""
        fitting = [node for node in self.free if fits(bundle, node)]
        if not fitting:
            return False
        node = min(fitting, key=lambda free: self._share({k: free[k] for k in bundle}))
        for name, amount in bundle.items():
            node[name] -= amount
        return True

    def put_all(self, demand: Demand, counts: Mapping[str, int]) -> bool:
        """Put all these processes, or none."""
        before = [dict(node) for node in self.free]
        done = all(
            self.put(demand.groups[name].bundle)
            for name, count in counts.items()
            for _ in range(count)
        )
        if not done:
            self.free = before
        return done

    def put_some(self, demand: Demand, counts: Mapping[str, int]) -> None:
        """Put as many of these processes as there is room for."""
        for name, count in counts.items():
            for _ in range(count):
                self.put(demand.groups[name].bundle)

    def dominant_share(self, demand: Demand, counts: Mapping[str, int]) -> float:
        """The largest part of any resource of the pool that these processes take."""
        return self._share(demand.resources(counts))

    def _share(self, amounts: Resources) -> float:
        known = {name: v for name, v in amounts.items() if self.total.get(name)}
        return max((v / self.total[name] for name, v in known.items()), default=0.0)

    def fill(self, demands: Sequence[Demand], counts: Counts, limits: Counts) -> None:
        """Raise `counts` towards `limits`, always of the one who is furthest behind, in place."""
        closed: set[tuple[str, str]] = set()

        def growing(demand: Demand) -> str:
            mine, most = counts[demand.holder], limits[demand.holder]
            names = (g for g in demand.groups if mine[g] < most[g])
            return next((g for g in names if (demand.holder, g) not in closed), "")

        while open_ones := [demand for demand in demands if growing(demand)]:
            behind = min(
                open_ones,
                key=lambda d: (
                    -d.priority,
                    self.dominant_share(d, counts[d.holder]) / d.weight,
                ),
            )
            group = growing(behind)
            if self.put(behind.groups[group].bundle):
                counts[behind.holder][group] += 1
            else:
                closed.add((behind.holder, group))


@dataclass(frozen=True)
class Targets:
    """What every step at work or let in should have."""

    counts: Counts
    admitted: list[Demand]


def targets(
    nodes: Sequence[Resources],
    running: Sequence[Demand],
    waiting: Sequence[Demand],
    most: Counts | None = None,
) -> Targets:
    """Share the nodes among steps at work and, in their order, steps that wait.

    Nobody overtakes one that waits: otherwise small steps would keep a large one out for ever.

    Args:
        most: by holder, less than its groups' `high` where more would be of no use at the moment.
    """
    room = Room(nodes)
    for demand in running:
        room.put_some(demand, demand.at_least())
    admitted: list[Demand] = []
    for demand in waiting:
        if not room.put_all(demand, demand.at_least()):
            break
        admitted.append(demand)
    taking_part = [*running, *admitted]
    counts = {d.holder: d.at_least() for d in taking_part}
    high = {d.holder: {n: g.high for n, g in d.groups.items()} for d in taking_part}
    room.fill(taking_part, counts, high | (most or {}))
    return Targets(counts, admitted)


def fits(bundle: Resources, free: Resources) -> bool:
    return all(free.get(name, 0.0) + ROUNDING >= amount for name, amount in bundle.items())


def times(bundle: Resources, count: int) -> Resources:
    return {name: amount * count for name, amount in bundle.items()}


def summed(parts: Iterable[Resources]) -> Resources:
    total: Resources = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def missing(nodes: Sequence[Resources], demand: Demand) -> str:
    """What a whole cluster lacks for the least a step asks for, in words; empty: nothing."""
    needed, total = demand.resources(demand.at_least()), summed(nodes)
    short = {k: v for k, v in needed.items() if v > total.get(k, 0.0) + ROUNDING}
    if short:
        return ", ".join(f"{v:g} {k} of {total.get(k, 0.0):g}" for k, v in short.items())
    if Room(nodes).put_all(demand, demand.at_least()):
        return ""
    each = (f"{group.low} x {group.bundle}" for group in demand.groups.values())
    return f"{' and '.join(each)} do not fit on its {len(nodes)} nodes"
