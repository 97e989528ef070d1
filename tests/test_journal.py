"""The journal of a run: what is entered stays, also when the journal's process is lost."""

import json
import os
from pathlib import Path

import pytest

from bar_ray import storage
from bar_ray.cluster import journal

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
    assert set(kept.board) == {"route/bar", "route/bar (few steps)"}
    kept.close()
