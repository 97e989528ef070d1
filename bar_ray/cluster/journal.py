"""What happened in a run, owned by one actor: events, metrics, TensorBoard, console lines.

`<storage>/runs/<run id>/` gets run.json, events.jsonl and metrics.jsonl. A local file is appended
to; an object store has no append, so there the whole object is put again every few seconds.
"""

import json
import os
import re
import time
from typing import Any

import ray
from ray.util.metrics import Gauge

from bar_ray import storage
from bar_ray.log import step_line, titled

CONSOLE_EVERY_S = 5.0
UPLOAD_EVERY_S = 10.0
NAMES = ("events.jsonl", "metrics.jsonl")
NOT_METRICS = ("time", "verb", "name", "arm", "fingerprint", "step", "steps", "eta_s")


@ray.remote(num_cpus=0, max_concurrency=1)
class Journal:
    """One per run, on the driver's node."""

    def __init__(self, storage_uri: str, run_id: str) -> None:
        self.run_id, self.uri = run_id, storage.join(storage_uri, "runs", run_id)
        self.local = storage.is_local(self.uri)
        if self.local:
            self.folder = storage.local_path(self.uri)
            os.makedirs(self.folder, exist_ok=True)
        else:
            self.folder = storage.scratch(storage.staging_folder(storage_uri))
            self._fetch()
        self.files = {name: open(os.path.join(self.folder, name), "a") for name in NAMES}
        self.board: dict[str, Any] = {}
        self.gauges: dict[str, Gauge] = {}
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

    def pool(self, view: dict[str, Any]) -> None:
        """Who holds what of the cluster now, for `jobs/pool.py`."""
        known = {"run": self.run_id, "time": time.time(), **view}
        self._put("pool.json", json.dumps(known).encode())

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
        for name, value in record.items():
            if name not in NOT_METRICS and isinstance(value, int | float):
                self._publish(who, record["step"], name, value)
                self._gauge(name).set(value, tags={"expert": title, "stage": record["verb"]})

    def _publish(self, who: str, step: int, name: str, value: float) -> None:
        if who not in self.board:
            from tensorboardX import SummaryWriter  # imports torch: seconds

            folder = os.path.join(self.folder, "tensorboard", who)
            self.board[who] = SummaryWriter(folder, flush_secs=10)
        self.board[who].add_scalar(name, value, step)

    def _gauge(self, name: str) -> Gauge:
        if name not in self.gauges:
            metric = "bar_ray_" + re.sub(r"\W", "_", name)
            self.gauges[name] = Gauge(metric, f"{name} of a stage", tag_keys=("expert", "stage"))
        return self.gauges[name]

    def _write(self, name: str, record: dict[str, Any]) -> None:
        self.files[name].write(json.dumps(record) + "\n")
        self.files[name].flush()
        if not self.local and time.monotonic() - self.uploaded > UPLOAD_EVERY_S:
            self._upload()

    def _upload(self) -> None:
        self.uploaded = time.monotonic()
        for name in self.files:
            with open(os.path.join(self.folder, name), "rb") as file:
                self._put(name, file.read())

    def _put(self, name: str, content: bytes) -> None:
        storage.write_bytes(storage.join(self.uri, name), content)

    def drain(self) -> list[str]:
        """Console lines since the last call."""
        lines, self.lines = self.lines, []
        return lines

    def close(self) -> list[str]:
        for writer in self.board.values():
            writer.close()
        if not self.local:
            self._upload()
            storage.discard(self.folder)
        return self.drain()
