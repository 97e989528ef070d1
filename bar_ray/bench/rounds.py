"""Interleaved rounds: every side once in each round, so that all of them see the same machine.

A ratio is formed within a round, and told with its spread over rounds. Nothing else here is a
figure worth quoting: seconds change with the machine, and with the hour on a shared one.
"""

import gc
import multiprocessing
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

LEAST_ROUNDS = 3
ROOM_S = 30.0  # for one measurement, as far as so many rounds allow it


@dataclass(frozen=True)
class Ratio:
    """How many times as long as ours a peer takes: the median over rounds, lowest, highest."""

    peer: str
    times: float
    low: float
    high: float

    @property
    def shown(self) -> str:
        return f"{self.times:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class Row:
    """One measurement: what was done, in seconds of ours, against its peers."""

    what: str
    seconds: float
    ratios: tuple[Ratio, ...]
    about: Mapping[str, str]  # other figures, by name

    def record(self) -> dict[str, Any]:
        return asdict(self)


def measure(what: str, sides: Mapping[str, Callable[[], Any]], rounds: int, **about: str) -> Row:
    """The first side is ours. A first round is not counted: it warms everything up.

    On a slow machine there are fewer rounds, but three at least.
    """
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    began = time.perf_counter()
    for number in range(rounds + 1):
        if number > LEAST_ROUNDS and time.perf_counter() - began > ROOM_S:
            break
        for name in order[number % len(order) :] + order[: number % len(order)]:
            gc.collect()
            started = time.perf_counter()
            told = sides[name]()  # a side that measures itself returns its seconds
            taken = time.perf_counter() - started
            seconds[name].append(told if isinstance(told, float) else taken)
    ours, *peers = order
    about = {**about, "rounds": str(len(seconds[ours]) - 1)}
    warm = {name: each[1:] for name, each in seconds.items()}
    ratios = tuple(ratio(name, warm[name], warm[ours]) for name in peers)
    return Row(what, median(warm[ours]), ratios, about)


def ratio(peer: str, theirs: list[float], ours: list[float]) -> Ratio:
    each = [their / our for their, our in zip(theirs, ours, strict=True)]
    return Ratio(peer, median(each), min(each), max(each))


def peak_mib(work: Callable[..., Any], *args: Any) -> tuple[float, float]:
    """Resident memory of a process of its own at most, and beyond what it had before the work.

    `work(*args)` prepares, and returns what is then called.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_watched, args=(send, work, args))
    process.start()
    send.close()
    try:
        before, peak = receive.recv()
    except EOFError:
        raise RuntimeError(f"{work.__name__} failed in a process of its own") from None
    finally:
        process.join()
    return peak, peak - before


def _watched(send: Any, work: Callable[..., Callable[[], Any]], args: tuple[Any, ...]) -> None:
    act = work(*args)
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak of what prepared is no longer told
    before = _resident("VmRSS")
    act()
    send.send((before, _resident("VmHWM")))


def _resident(kind: str) -> float:
    """MiB of this program: `ru_maxrss` is handed down from who started it."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{kind}:")[1].split()[0]) / 1024


def table(rows: list[Row]) -> str:
    """Markdown: a line per measurement and peer."""
    lines = ["| what | ours | peer | peer takes, times ours | |", "|---|---|---|---|---|"]
    for row in rows:
        about = "; ".join(f"{name} {value}" for name, value in row.about.items())
        for place, each in enumerate(row.ratios or (None,)):
            first = (row.what, f"{row.seconds:.3g} s") if not place else ("", "")
            shown = (each.peer, each.shown) if each else ("", "")
            lines.append(f"| {' | '.join((*first, *shown, '' if place else about))} |")
    return "\n".join(lines)
