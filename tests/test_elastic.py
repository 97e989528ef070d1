"""Nodes that come, go and are taken away: real raylets on one machine."""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bar_ray import storage
from bar_ray.train import notice
from bar_ray.train.notice import Notice


class Preemption:
    """What Ray Train would say."""

    def __init__(self, node: str, seconds: float) -> None:
        self.preempted_node_ids = [node]
        self.deadline_ms = int(1000 * (time.time() + seconds))


def test_a_notice_leads_to_a_checkpoint_and_to_a_last_one(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[dict[str, Any]] = []
    answer: list[Preemption | None] = [None]
    monkeypatch.setattr(notice.ray.train, "get_preemption_info", lambda: answer[0])
    asked = Notice(lambda work: work(), lambda **fields: said.append(fields))
    now = iter(range(0, 100, 1))
    monkeypatch.setattr(notice.time, "monotonic", lambda: float(next(now)))  # a step takes 1 s
    assert not any(asked.wants_checkpoint(step, 60.0) for step in range(1, 8))
    assert asked.every == 2
    asked.saved(3.0)
    answer[0] = Preemption("a", 100.0)
    wanted = [asked.wants_checkpoint(step, 60.0) for step in (9, 10, 11, 12)]
    assert wanted == [False, True, False, False]
    assert said[0]["at"] == 10 and said[0]["nodes"] == ["a"] and 99 < said[0]["seconds_left"] <= 100
    answer[0] = Preemption("a", 14.9)  # 2 x (3 s to save + 2 s until the next question) + 5 s
    assert [asked.wants_checkpoint(step, 60.0) for step in (14, 16)] == [True, False]
    answer[0] = Preemption("b", 100.0)
    assert [asked.wants_checkpoint(step, 60.0) for step in (18, 20)] == [True, False]
    assert len(said) == 2


def test_the_pool_is_asked_in_the_same_rhythm(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[float] = []
    monkeypatch.setattr(notice.ray.train, "get_preemption_info", lambda: None)
    now = iter(range(0, 100, 1))
    monkeypatch.setattr(notice.time, "monotonic", lambda: float(next(now)))

    def resize(left_s: float) -> bool:
        left.append(left_s)
        return left_s < 90

    asked = Notice(lambda work: work(), lambda **fields: None, resize)
    said = [asked.wants_checkpoint(step, 100.0 - step) for step in range(1, 13)]
    assert left == [94.0, 92.0, 90.0, 88.0]
    assert [step for step, wanted in enumerate(said, 1) if wanted] == [12]


# --- on a cluster --------------------------------------------------------------------------------

slow, several = pytest.mark.slow, pytest.mark.cluster


@contextlib.contextmanager
def started() -> Iterator[Any]:
    """A head that takes no work; a test adds its nodes."""
    from ray.cluster_utils import Cluster

    made = Cluster(
        initialize_head=True,
        head_node_args={"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0},
    )
    yield made
    made.shutdown()


@pytest.fixture
def cluster() -> Iterator[Any]:
    with started() as made:
        yield made


class Metadata(BaseHTTPRequestHandler):
    """The metadata server of a spot machine, on AWS and on Google."""

    taken_at: float | None = None  # epoch seconds

    def do_PUT(self) -> None:
        assert self.path == "/latest/api/token"
        assert self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(200, "secret")

    def do_GET(self) -> None:
        taken_at = type(self).taken_at
        if self.path == "/computeMetadata/v1/instance/preempted":
            assert self.headers["Metadata-Flavor"] == "Google"
            self.answer(200, "FALSE" if taken_at is None else "TRUE")
        elif self.headers["X-aws-ec2-metadata-token"] != "secret":
            self.answer(401, "")
        elif taken_at is None:
            self.answer(404, "")
        else:
            assert self.path == "/latest/meta-data/spot/instance-action"
            goes = datetime.fromtimestamp(taken_at, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
            self.answer(200, json.dumps({"action": "terminate", "time": goes}))

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def metadata(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Metadata, "taken_at", None)
    with ThreadingHTTPServer(("127.0.0.1", 0), Metadata) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(("cloud", "seconds"), [("aws", 90), ("gcp", 30)])
def test_notices_of_the_clouds(
    metadata: str, cloud: str, seconds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    deadline = runpy.run_path("conf/clusters/node/spot_notice.py")["DEADLINES"][cloud]
    assert deadline(metadata) is None
    monkeypatch.setattr(Metadata, "taken_at", time.time() + seconds)
    assert abs(deadline(metadata) - time.time() - seconds) < 2


def events(store: Path, name: str) -> list[dict[str, Any]]:
    texts = [path.read_text() for path in store.glob("runs/*/events.jsonl")]
    found = [json.loads(line) for text in texts for line in text.splitlines()]
    return [event for event in found if event["event"] == name]


def wait_for(what: Callable[[], Any], driver: subprocess.Popen, seconds: float = 240) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert driver.poll() is None, "the driver ended"
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return found


@slow
@several
def test_a_preempted_stage_saves_in_time_and_goes_on_elsewhere(
    cluster: Any, metadata: str, tmp_path: Path
) -> None:
    """Nothing between the notice and the deadline is lost but what came after its checkpoint."""
    first = cluster.add_node(num_cpus=1)
    here = runpy.run_path("conf/clusters/node/spot_notice.py")["node_here"](cluster.address)
    assert here in {node.node_id for node in cluster.list_all_nodes()}
    with job(cluster, str(tmp_path)) as driver:
        wait_for(lambda: metrics(tmp_path, 20), driver)
        cluster.add_node(num_cpus=1)
        Metadata.taken_at = time.time() + 15
        watch = [sys.executable, "conf/clusters/node/spot_notice.py", "--cloud=aws"]
        watch += [f"--metadata={metadata}", f"--node-id={first.node_id}"]
        told = subprocess.check_output([*watch, f"--address={cluster.address}"], timeout=30)
        assert b"this machine goes in 1" in told
        [said] = wait_for(lambda: events(tmp_path, "preemption"), driver, 30)
        saved = wait_for(lambda: events(tmp_path, "checkpoint"), driver, 10)
        assert saved[0]["at"] == said["at"]
        time.sleep(max(0.0, said["time"] + said["seconds_left"] - time.time()))
        cluster.remove_node(first, allow_graceful=False)
        assert driver.wait(400) == 0
    [resumed] = events(tmp_path, "resumed")
    last = max(
        event["at"] for event in events(tmp_path, "checkpoint") if event["time"] < resumed["time"]
    )
    assert resumed["at"] == last >= said["at"]
    assert len(events(tmp_path, "trained")) == 1


def job(cluster: Any, place: str, *settings: str, **environment: str) -> subprocess.Popen:
    """A driver that pretrains the small world's base; `settings` are of that stage."""
    where = [f"storage={place}", f"cluster.address={cluster.address}", "cluster.resize_s=5"]
    overrides = [f"tiny.pretrain.{setting}" for setting in settings]
    command = [sys.executable, "-c", PRETRAIN, *where, *overrides]
    return subprocess.Popen(command, env={**os.environ, **FAST, **environment})


@slow
@several
def test_two_runs_share_a_pool(cluster: Any, tmp_path: Path) -> None:
    """One gives workers up when the other comes, from checkpoints made for it."""
    cluster.add_node(num_cpus=3)
    long, short = tmp_path / "long", tmp_path / "short"
    sizes = ("run.num_workers=3", "run.min_workers=1")
    with job(cluster, str(long), "steps=500", *sizes) as first:
        wait_for(lambda: metrics(long, 20), first)
        with job(cluster, str(short), "steps=20", *sizes) as second:
            assert second.wait(200) == 0
        assert first.poll() is None, "it should still be at work"
        look = [sys.executable, "jobs/pool.py", "conf/tiny.yaml", f"storage={long}", "--json"]
        rows = json.loads(subprocess.check_output(look))["steps"]
        assert "train pretrained" in [row["step"] for row in rows]
        assert first.wait(200) == 0
    counts = [e["held"]["workers"] for e in events(long, "resized") if e["verb"] == "train"]
    assert counts[0] == 3 and min(counts) < 3, counts
    saved = {event["at"] for event in events(long, "checkpoint")}
    resumed = [event["at"] for event in events(long, "resumed")]
    assert resumed and set(resumed) <= saved
    [rows] = [p.read_text().splitlines() for p in long.glob("runs/*/metrics.jsonl")]
    assert {json.loads(row)["step"] for row in rows} == set(range(1, 501)), "none left out"


@slow
@several
def test_a_new_cluster_goes_on_from_object_storage(s3: str, tmp_path: Path) -> None:
    """The whole first cluster is gone, with its disks; the same command goes on on another."""
    place = f"s3://bkt/{tmp_path.name}{s3}"
    saved = storage.join(place, "checkpoints", "train")
    settings = ("steps=300", "run.checkpoint_every=50")
    with started() as first:
        first.add_node(num_cpus=1)
        driver = job(first, place, *settings, BAR_RAY_CACHE=str(tmp_path / "first"))
        wait_for(lambda: "MANIFEST" in str(storage.list_files(saved, recursive=True)), driver)
    assert driver.wait(120) != 0
    with started() as second:
        second.add_node(num_cpus=1)
        with job(second, place, *settings, BAR_RAY_CACHE=str(tmp_path / "second")) as driver:
            assert driver.wait(300) == 0
    runs = [u for u in storage.list_files(storage.join(place, "runs"), True) if "events" in u]
    found = [json.loads(line) for uri in runs for line in storage.read_bytes(uri).splitlines()]
    assert [e["at"] >= 50 for e in found if e["event"] == "resumed"] == [True]
    assert len([e for e in found if e["event"] == "trained"]) == 1


PRETRAIN = """
import sys
from bar_ray import builder, config
from bar_ray.cluster import session
run = ("run.checkpoint_every=10000", "run.cpus_per_worker=1", "run.threads=1")
settings = ("steps=500", "seq_len=64", *run)
overrides = [f"tiny.pretrain.{setting}" for setting in settings]
recipe = config.load("conf/tiny.yaml", [*overrides, *sys.argv[1:]])
session.drive(recipe, [builder.Builder(recipe).dense()[1]])
"""
FAST = {"RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1"}


def metrics(store: Path, step: int) -> bool:
    texts = [path.read_text() for path in store.glob("runs/*/metrics.jsonl")]
    return any(f'"step": {step},' in text for text in texts)
