"""What happened in a run, owned by one actor: events, metrics, trackers, console lines.

`<storage>/runs/<run id>/` gets run.json, events.jsonl, metrics.jsonl and transcripts.jsonl (some
rollouts, to read). A local file is appended to; an object store has no append, so there the whole
object is put again every few seconds.
"""

import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import ray

from bar_ray import storage
from bar_ray.cluster import trackers
from bar_ray.cluster.exporter import Exporter
from bar_ray.log import step_line, titled
from bar_ray.recipe import Tracking

CONSOLE_EVERY_S = 5.0
UPLOAD_EVERY_S = 10.0
NAMES = ("events.jsonl", "metrics.jsonl", "transcripts.jsonl")
NOT_METRICS = ("time", "verb", "name", "arm", "fingerprint", "step", "steps", "eta_s")


@ray.remote(num_cpus=0, max_concurrency=1)
class Journal:
    """One per run, on the driver's node."""

    def __init__(self, storage_uri: str, run_id: str, tracking: Tracking | None = None) -> None:
        self.run_id, self.uri = run_id, storage.join(storage_uri, "runs", run_id)
        self.local = storage.is_local(self.uri)
        if self.local:
            self.folder = storage.local_path(self.uri)
            os.makedirs(self.folder, exist_ok=True)
        else:
            self.folder = storage.scratch(storage.staging_folder(storage_uri))
            self._fetch()
        self.files = {name: open(os.path.join(self.folder, name), "a") for name in NAMES}
        self.trackers = trackers.made(tracking or Tracking(), run_id, self.folder)
        self.exporter = Exporter(run_id)
        self.lines: list[str] = []
        self.shown: dict[str, float] = {}
        self.uploaded = time.monotonic()

    def _fetch(self) -> None:
        """What a journal before this one, lost and started again, had put there."""
        for name in NAMES:
            uri = storage.join(self.uri, name)
            if storage.exists(uri):
                storage.pour(uri, os.path.join(self.folder, name))

    def event(self, event: str, **fields: Any) -> None:
        """Something that happened once: a step started, finished, failed; a fault; a resume."""
        self._write("events.jsonl", {"time": time.time(), "event": event, **fields})
        self.exporter.event(event)
        if event in ("finished", "failed"):
            title = titled(fields.get("name", ""), fields.get("arm", ""))
            self.exporter.end((title, fields.get("verb", "")))

    def pool(self, view: dict[str, Any]) -> None:
        """Who holds what of the cluster now, for `jobs/pool.py`."""
        self.exporter.view(view)
        known = {"run": self.run_id, "time": time.time(), **view}
        self._put("pool.json", json.dumps(known).encode())

    def transcript(self, **fields: Any) -> None:
        """A prompt with some of its completions and their rewards."""
        self._write("transcripts.jsonl", {"time": time.time(), **fields})

    def say(self, line: str) -> None:
        self.lines.append(line)

    def metrics(self, record: dict[str, Any]) -> None:
        """Numbers of one training step; `verb`, `name`, `step`, `steps` say whose."""
        self._write("metrics.jsonl", {"time": time.time(), **record})
        title = titled(record["name"], record.get("arm", ""))
        who = f"{record['verb']}/{title}"
        last = record["step"] == record["steps"]
        if last or time.monotonic() - self.shown.get(who, 0.0) >= CONSOLE_EVERY_S:
            self.shown[who] = time.monotonic()
            self.lines.append(step_line(record))
        self.exporter.record((title, record["verb"]), record)
        numbers = {
            name: value
            for name, value in record.items()
            if name not in NOT_METRICS and isinstance(value, int | float) and math.isfinite(value)
        }
        for name, tracker in list(self.trackers.items()):
            self._track(name, partial(tracker.log, who, record["step"], numbers))

    def _track(self, name: str, work: Callable[[], None]) -> None:
        """A tracker that fails, whatever its reason, costs its own numbers alone."""
        try:
            work()
        except Exception as error:
            del self.trackers[name]
            self.event("tracker_lost", tracker=name, reason=f"{type(error).__name__}: {error}")
            self.lines.append(f"{name} takes no more numbers of this run: {error}")

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self.files[name].write(json.dumps(finite(record)) + "\n")
        self.files[name].flush()
        if not self.local and time.monotonic() - self.uploaded > UPLOAD_EVERY_S:
            self._upload()

    def _upload(self) -> None:
        self.uploaded = time.monotonic()
        for name in self.files:
            with open(os.path.join(self.folder, name), "rb") as file:
                self._put(name, file.read())

    def _upload_events(self) -> None:
        """TensorBoard's files, which it reads from object storage too."""
        for path, _, names in os.walk(os.path.join(self.folder, "tensorboard")):
            for name in names:
                with open(os.path.join(path, name), "rb") as file:
                    self._put(os.path.relpath(os.path.join(path, name), self.folder), file.read())

    def _put(self, name: str, content: bytes) -> None:
        storage.write_bytes(storage.join(self.uri, name), content)

    def drain(self) -> list[str]:
        """Console lines since the last call."""
        lines, self.lines = self.lines, []
        return lines

    def close(self) -> list[str]:
        self.exporter.close()
        for name, tracker in list(self.trackers.items()):
            self._track(name, tracker.close)
        if not self.local:
            self._upload()
            self._upload_events()
            storage.discard(self.folder)
        return self.drain()


def finite(value: Any) -> Any:
    """JSON knows no infinities, and no number that is none: they become null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    return [finite(each) for each in value] if isinstance(value, list) else value
