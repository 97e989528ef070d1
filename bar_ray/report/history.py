"""What the runs on a storage recorded, read back.

A step that is reused was trained in an earlier run, so metrics and events of all runs are searched
for the steps in question. After a kill the last line of a file may be cut off: it is skipped.
"""

import json
from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Any

from bar_ray import storage
from bar_ray.graph import Step

Record = dict[str, Any]
Who = tuple[str, str, str]  # verb, name, fingerprint
ROUTINE = (
    *("waiting", "started", "trained", "finished", "reused", "checkpoint", "published"),
    *("engine_ready", "held_out", "resized"),
)
# What follows an incident, or comes before the `resumed` it leads to, is not counted once more.
NOT_SURVIVED = ("failed", "weights_repaired", "preemption")


def who(record: Record) -> Who:
    return record.get("verb", ""), record.get("name", ""), record.get("fingerprint", "")


def identity(step: Step) -> Who:
    return step.verb, step.name, step.fingerprint


@dataclass(frozen=True)
class Span:
    """One step in a run: ready to start, given its resources, ended. Times are epoch seconds.

    `sizes` are the resources it held, each since the time beside it.
    """

    who: Who
    ready: float
    started: float
    ended: float
    outcome: str
    sizes: tuple[tuple[float, dict[str, float]], ...] = ()

    def held(self, kind: str) -> list[tuple[float, float, float]]:
        """(from, to, amount) of a resource."""
        ends = [*(at for at, _ in self.sizes[1:]), self.ended]
        return [
            (at, end, amounts.get(kind, 0.0))
            for (at, amounts), end in zip(self.sizes, ends, strict=True)
        ]


@dataclass(frozen=True)
class History:
    """Metrics by step (one row per optimizer step, the latest wins) and events, oldest first."""

    metrics: dict[Who, list[Record]]
    events: list[Record]  # with `run`, the run they belong to

    def of_run(self, run_id: str) -> list[Record]:
        return [event for event in self.events if event["run"] == run_id]

    def incidents(self) -> list[Record]:
        """Resumes, faults, failures: everything out of the ordinary."""
        return [event for event in self.events if event["event"] not in ROUTINE]

    def survived(self) -> int:
        """How many incidents the runs went on from."""
        return sum(event["event"] not in NOT_SURVIVED for event in self.incidents())

    def held_out(self, step: Step) -> list[tuple[float, float]]:
        """(optimizer step, score) of the weights that were scored while training."""
        mine = [e for e in self.events if e["event"] == "held_out" and who(e) == identity(step)]
        return sorted({float(e["at"]): float(e["held_out"]) for e in mine}.items())

    def goodput(self) -> float | None:
        """Time in optimizer steps that count, over the time that trained steps held resources.

        In all runs together: what a fault undid, waiting and starting up are time without use.
        """
        useful = {step: seconds_of(rows) for step, rows in self.metrics.items()}
        runs = {event["run"] for event in self.events}
        held = [span for run in runs for span in spans(self.of_run(run)) if useful.get(span.who)]
        total = sum(span.ended - span.started for span in held)
        return sum(useful[who] for who in {span.who for span in held}) / total if total else None

    def made_by(self) -> dict[Who, Record]:
        """The event of each step's finishing, in whichever run."""
        return {who(event): event for event in self.events if event["event"] == "finished"}


def read(storage_uri: str, steps: Collection[Step], run_id: str) -> History:
    """Everything recorded about `steps`, and of `run_id` also what belongs to no step."""
    return _read(storage_uri, {identity(step) for step in steps}, run_id)


def of_lines(storage_uri: str, lines: Collection[str]) -> dict[str, list[Record]]:
    """Metrics of the steps of a lineage ("verb name fingerprint"), whatever became of them."""
    metrics = _read(storage_uri, {tuple(line.split()) for line in lines}, "").metrics
    return {" ".join(step): rows for step, rows in metrics.items()}


def _read(storage_uri: str, wanted: set[Who], run_id: str) -> History:
    rows: dict[Who, dict[int, Record]] = defaultdict(dict)
    events: list[Record] = []
    for uri in storage.list_files(storage.join(storage_uri, "runs"), recursive=True):
        run, name = uri.partition("?")[0].split("/")[-2:]
        if name == "metrics.jsonl":
            for record in _lines(uri):
                if who(record) in wanted:
                    known = rows[who(record)].get(record["step"])
                    if known is None or known["time"] <= record["time"]:
                        rows[who(record)][record["step"]] = record
        elif name == "events.jsonl":
            found = [{**record, "run": run} for record in _lines(uri)]
            events += [e for e in found if who(e) in wanted or (run == run_id and not who(e)[2])]
    by_step = {key: [found[step] for step in sorted(found)] for key, found in rows.items()}
    return History(by_step, sorted(events, key=lambda event: event["time"]))


def _lines(uri: str) -> list[Record]:
    records = []
    for line in storage.read_bytes(uri).splitlines():
        try:
            records.append(json.loads(line))
        except ValueError:
            continue
    return records


def run_description(storage_uri: str, run_id: str) -> Record:
    """The run's `run.json`, empty when it is not there."""
    place = storage.join(storage_uri, "runs", run_id, "run.json")
    return storage.read_json(place) if storage.exists(place) else {}


def seconds_of(rows: list[Record]) -> float:
    """Time in the optimizer steps of these metrics."""
    return sum(row.get("seconds", 0.0) for row in rows)


def tokens_of(rows: list[Record]) -> float:
    """Tokens that these optimizer steps learned from."""
    return sum(row["tokens_per_s"] * row["seconds"] for row in rows)


def spans(events: list[Record]) -> list[Span]:
    """The steps of one run over time, in order of their start."""
    found: dict[Who, Span] = {}
    waiting: dict[Who, float] = {}
    for event in events:
        step, now = who(event), event["time"]
        if event["event"] == "waiting":
            waiting[step] = now
        elif event["event"] == "started":
            ready, last = waiting.get(step, now), events[-1]["time"]
            sizes = ((now, event["resources"]),)
            found[step] = Span(step, ready, now, last, "unfinished", sizes)
        elif step in found and event["event"] == "resized":
            sizes = (*found[step].sizes, (now, event["resources"]))
            found[step] = replace(found[step], sizes=sizes)
        elif step in found and event["event"] in ("finished", "failed"):
            found[step] = replace(found[step], ended=now, outcome=event["event"])
    return sorted(found.values(), key=lambda span: span.ready)


def resource_hours(run_spans: list[Span]) -> dict[str, float]:
    """Leased resources times the hours they were held."""
    total: dict[str, float] = defaultdict(float)
    for span in run_spans:
        for kind in {kind for _, amounts in span.sizes for kind in amounts}:
            total[kind] += sum(amount * (end - at) for at, end, amount in span.held(kind)) / 3600
    return dict(sorted(total.items()))
