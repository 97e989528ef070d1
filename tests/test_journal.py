"""The journal of a run: what is entered stays, also when the journal's process is lost."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from bar_ray import storage
from bar_ray.cluster import exporter, journal

Journal = journal.Journal.__ray_metadata__.modified_class  # without its process


def test_a_lost_journal_goes_on_from_what_is_in_storage(
    root: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BAR_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(journal, "UPLOAD_EVERY_S", -1.0)
    Journal(root, "r1").event("started", name="math")
    second = Journal(root, "r1")
    second.event("finished", name="math")
    second.close()
    lines = storage.read_bytes(storage.join(root, "runs", "r1", "events.jsonl")).splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["started", "finished"]
    if not storage.is_local(root):  # the first one's folder; its process is still there
        assert len(os.listdir(tmp_path / "cache")) == 1


def test_a_step_of_an_arm_has_lines_and_curves_of_its_own(root: str, tmp_path: Path) -> None:
    kept = Journal(root, "r1")
    record = {
        "verb": "route",
        "name": "bar",
        "fingerprint": "f",
        "step": 1,
        "steps": 1,
        "loss": 0.5,
    }
    kept.metrics(record)
    kept.metrics({**record, "arm": "few steps"})
    assert [line.split("|")[0].strip() for line in kept.lines] == ["bar", "bar (few steps)"]
    assert set(kept.trackers["tensorboard"].writers) == {"route/bar", "route/bar (few steps)"}
    kept.close()


RECORD = {"verb": "rlvr", "name": "math", "fingerprint": "f", "step": 3, "steps": 9, "loss": 0.5}


def test_numbers_that_json_lacks_become_null(tmp_path: Path) -> None:
    kept = Journal(str(tmp_path), "r1")
    kept.metrics({**RECORD, "reward": float("nan"), "parts": [float("inf"), 1.0]})
    kept.close()
    [line] = (tmp_path / "runs" / "r1" / "metrics.jsonl").read_text().splitlines()
    assert '"reward": null' in line and '"parts": [null, 1.0]' in line


def test_a_tracker_that_fails_costs_itself_alone(tmp_path: Path) -> None:
    class Broken:
        def log(self, *_: object) -> None:
            raise ConnectionError("the server is gone")

        def close(self) -> None:
            raise AssertionError("it was left out")

    class LateBroken(Broken):
        def log(self, *_: object) -> None:
            pass

    kept = Journal(str(tmp_path), "r1")
    kept.trackers["wandb"], kept.trackers["mlflow"] = Broken(), LateBroken()
    kept.metrics(RECORD)
    kept.metrics({**RECORD, "step": 4})
    assert any(
        "wandb takes no more numbers of this run: the server is gone" in x for x in kept.lines
    )
    kept.close()
    events = (tmp_path / "runs" / "r1" / "events.jsonl").read_text()
    assert events.count('"wandb"') == 1 and events.count("tracker_lost") == 2
    assert [*(tmp_path / "runs" / "r1" / "tensorboard" / "rlvr" / "math").iterdir()]


def test_tensorboard_is_kept_on_object_storage(s3: str, tmp_path: Path) -> None:
    uri = f"s3://bkt/{tmp_path.name}{s3}"
    kept = Journal(uri, "r1")
    kept.metrics(RECORD)
    kept.close()
    found = storage.list_files(storage.join(uri, "runs", "r1", "tensorboard"), True)
    assert len(found) == 1 and "events.out.tfevents" in found[0]


def test_gauges_of_stages_at_work_are_set_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray forgets a gauge that is not: a step of minutes would leave holes."""
    said: list[tuple[str, float, str]] = []

    class Metric:
        def __init__(self, name: str, *_: object, **__: object) -> None:
            self.name = name

        def set(self, value: float, tags: dict[str, str]) -> None:
            said.append((self.name, value, tags.get("expert", tags.get("resource", ""))))

        def inc(self, value: float, tags: dict[str, str]) -> None:
            said.append((self.name, value, tags.get("expert", tags.get("event", ""))))

    monkeypatch.setattr(exporter, "Gauge", Metric)
    monkeypatch.setattr(exporter, "Counter", Metric)
    kept = exporter.Exporter("r1", beat_s=0.05)
    kept.record(("math", "rlvr"), {**RECORD, "sync_mb": 2.0, "tokens_per_s": 10.0, "seconds": 2.0})
    kept.view({"total": {"CPU": 4.0}, "free": {"CPU": 1.0}})
    wait_for(lambda: said.count(("bar_ray_loss_nats", 0.5, "math")) > 2)
    assert ("bar_ray_weight_push_bytes", 2e6, "math") in said
    assert said.count(("bar_ray_tokens_total", 20.0, "math")) == 1, "a counter counts once"
    assert ("bar_ray_pool_resources", 3.0, "CPU") in said
    kept.end(("math", "rlvr"))
    time.sleep(0.1)
    said.clear()
    wait_for(lambda: ("bar_ray_pool_resources", 1.0, "CPU") in said)
    assert not [name for name, _, who in said if who == "math"], "it is at work no longer"
    kept.close()


def wait_for(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)
