"""What a run looks like now: its steps by expert and stage, waits, faults, newest numbers."""

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bar_ray import storage
from bar_ray.board.series import Curves, rows
from bar_ray.board.tail import Shrunk, Tail
from bar_ray.cluster.pace import Pace
from bar_ray.log import titled
from bar_ray.report.history import NOT_SURVIVED, ROUTINE, Record, Who, who
from bar_ray.types import UserError

FILES = ("events", "metrics", "transcripts")
STAGES = ("midtrain", "sft", "rlvr")
SILENT_S = 60.0  # a run at work writes who holds what every few seconds
MOST_TRANSCRIPTS = 40
MOST_FAULTS = 500


@dataclass
class Cell:
    """One step of the plan."""

    verb: str
    name: str
    fingerprint: str
    arm: str
    state: str = "to do"  # reused, waiting, running, finished, failed
    since: float = 0.0
    seconds: float = 0.0
    reason: str = ""
    held: dict[str, int] = field(default_factory=dict)
    curves: Curves = field(default_factory=Curves)
    held_out: list[tuple[float, float]] = field(default_factory=list)

    @property
    def key(self) -> str:
        """In links and in element ids."""
        return f"{self.verb}--{self.name}--{self.fingerprint}"

    @property
    def title(self) -> str:
        return titled(self.name, self.arm)

    @property
    def progress(self) -> float:
        last = self.curves.last
        if self.state in ("finished", "reused"):
            return 1.0
        return last.step / last.steps if last is not None and last.steps else 0.0


class Run:
    """A run as its files tell it, read a little at a time."""

    def __init__(self, storage_uri: str, run_id: str) -> None:
        self.storage_uri, self.run_id = storage_uri, run_id
        self.folder = storage.join(storage_uri, "runs", run_id)
        self.version = 0  # grows whenever something new was read
        self.pool: dict[str, Any] = {}
        self._begin()

    def _begin(self) -> None:
        self.description: Record = storage.read_json(storage.join(self.folder, "run.json"))
        plan = self.description.get("plan", [])
        self.cells: dict[Who, Cell] = {
            who(entry): Cell(
                *who(entry), entry.get("arm", ""), "reused" if entry.get("reused") else "to do"
            )
            for entry in plan
        }
        self.events: list[Record] = []
        self.faults: list[Record] = []
        self.transcripts: dict[Who, list[Record]] = {}
        self.latest = self.began
        self.tails = {name: Tail(storage.join(self.folder, f"{name}.jsonl")) for name in FILES}

    # --- reading ----------------------------------------------------------------------------------

    def catch_up(self, chunks: int = 1 << 30, files: Sequence[str] = FILES) -> bool:
        """Read what is new, at most so many chunks of each file; whether there may be more."""
        try:
            return self._catch_up(chunks, files)
        except Shrunk:  # the run was put there anew
            self._begin()
            self.version += 1
            return True

    def _catch_up(self, chunks: int, files: Sequence[str]) -> bool:
        more = False
        readers = dict(zip(FILES, (self._events, self._metrics, self._transcripts), strict=True))
        for name in files:
            for _ in range(chunks):
                lines = self.tails[name].read()
                if not lines:
                    break
                readers[name](lines)
                self.version += 1
            else:
                more = True
        return more

    def look_at_pool(self) -> None:
        """Who holds what, as the run wrote it last."""
        uri = storage.join(self.folder, "pool.json")
        if storage.exists(uri):
            found = storage.read_json(uri)
            self.version += found != self.pool
            self.pool = found
            self.latest = max(self.latest, float(found.get("time", 0.0)))

    def _events(self, lines: bytes) -> None:
        for event in _records(lines):
            self.latest = max(self.latest, event["time"])
            if cell := self._cell(event):
                _enter(cell, event)
            if event["event"] not in ROUTINE:
                self.faults.append(event)
                del self.faults[:-MOST_FAULTS]

    def _metrics(self, lines: bytes) -> None:
        for row in rows(lines):
            me = (row.verb, row.name, row.fingerprint)
            if me not in self.cells:
                self.cells[me] = Cell(*me, row.arm, "running", row.time)
            self.cells[me].curves.add(row)
            self.latest = max(self.latest, row.time)

    def _transcripts(self, lines: bytes) -> None:
        for record in _records(lines):
            kept = self.transcripts.setdefault(who(record), [])
            kept.append(record)
            del kept[:-MOST_TRANSCRIPTS]

    def _cell(self, event: Record) -> Cell | None:
        me = who(event)
        if not me[2]:
            return None
        if me not in self.cells:
            self.cells[me] = Cell(*me, event.get("arm", ""))
        return self.cells[me]

    # --- what is shown ----------------------------------------------------------------------------

    @property
    def state(self) -> str:
        """At work, ended, failed, or silent: its driver may be gone."""
        states = {cell.state for cell in self.cells.values()}
        if states <= {"finished", "reused"}:
            return "finished"
        if not self.pool.get("steps") and self.pool:
            return "failed" if "failed" in states else "ended early"
        return "at work" if time.time() - self.latest < SILENT_S else "silent"

    def eta(self) -> float | None:
        """Seconds until every step is finished, by how long those before took."""
        left = [c.verb for c in self.cells.values() if c.state in ("to do", "waiting", "running")]
        pace = Pace(lambda: max(self.latest, self.began))
        pace.began = self.began
        for cell in self.cells.values():
            if cell.state == "finished":
                pace.note(cell.verb, cell.seconds)
        return pace.eta(left) if left else None

    @property
    def began(self) -> float:
        return float(self.description.get("started", 0.0))

    def counts(self) -> dict[str, int]:
        found: dict[str, int] = {}
        for cell in self.cells.values():
            found[cell.state] = found.get(cell.state, 0) + 1
        return found

    def grid(self) -> dict[str, dict[str, Cell]]:
        """Expert -> stage -> its step. Several models of one run have rows of their own."""
        found: dict[str, dict[str, Cell]] = {}
        for cell in self.cells.values():
            if cell.verb in STAGES:
                found.setdefault(cell.title, {})[cell.verb] = cell
        return found

    def others(self) -> list[Cell]:
        """Steps beside the experts' stages that do something, and those at work first."""
        found = [c for c in self.cells.values() if c.verb not in STAGES and c.state != "reused"]
        order = ("running", "failed", "waiting", "to do", "finished")
        return sorted(found, key=lambda cell: order.index(cell.state))

    def find(self, key: str) -> Cell:
        for cell in self.cells.values():
            if cell.key == key:
                return cell
        raise UserError(f"run {self.run_id} has no step {key}")

    def survived(self) -> int:
        return sum(fault["event"] not in NOT_SURVIVED for fault in self.faults)


def _enter(cell: Cell, event: Record) -> None:
    """What an event says about its step."""
    match event["event"]:
        case "waiting":
            cell.state, cell.since = "waiting", event["time"]
        case "started":
            cell.state, cell.since = "running", event["time"]
            cell.held = event.get("held", {})
        case "resized":
            cell.held = event.get("held", {})
        case "finished" | "failed" as outcome:
            cell.state, cell.since = outcome, event["time"]
            cell.seconds, cell.reason = event.get("seconds", 0.0), event.get("reason", "")
        case "reused":
            cell.state = "reused"
        case "held_out":
            cell.held_out.append((float(event["at"]), float(event["held_out"])))


def _records(lines: bytes) -> Iterable[Record]:
    for line in lines.splitlines():
        try:
            yield json.loads(line)
        except ValueError:  # cut off by a kill
            continue


def run_ids(storage_uri: str) -> list[str]:
    """Runs on a storage, the newest first."""
    uris = storage.list_files(storage.join(storage_uri, "runs"), recursive=True)
    found = {uri.partition("?")[0].split("/")[-2] for uri in uris if "/run.json" in uri}
    return sorted(found, reverse=True)


def pick(storage_uri: str, run_id: str) -> str:
    """The run asked for, or the newest."""
    known = run_ids(storage_uri)
    if not known:
        raise UserError(f"no run has written anything to {storage_uri}/runs")
    if run_id and run_id not in known:
        raise UserError(f"no run {run_id} on {storage_uri}; there are {', '.join(known[:5])}")
    return run_id or known[0]


def words(event: Mapping[str, Any]) -> str:
    """What an event says beside its name and step."""
    known = ("time", "event", "verb", "name", "fingerprint", "run", "arm")
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in event.items()
        if name not in known
    )
