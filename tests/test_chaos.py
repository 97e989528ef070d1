"""Faults at random: the campaign's checks can fail, and a short campaign finds nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bar_ray import storage
from bar_ray.bench import chaos


def artifact(root: Path, name: str, content: str) -> None:
    folder = root / "work"
    folder.mkdir(parents=True)
    (folder / "weights").write_text(content)
    storage.commit(str(folder), str(root / "artifacts" / name), {})


def test_artifacts_that_differ_or_are_missing_are_named(tmp_path: Path) -> None:
    calm, hit = tmp_path / "calm", tmp_path / "hit"
    for name in ("sft/math/1", "sft/code/2", "merge/merged/3"):
        artifact(calm, name, name)
    artifact(hit, "sft/math/1", "sft/math/1")
    artifact(hit, "sft/code/2", "something else")
    found = chaos.differing(str(calm), str(hit), lambda verb: verb == "sft")
    assert found == {"compared": 2, "differ": ["sft/code/2"]}
    found = chaos.differing(str(calm), str(hit), lambda verb: True)
    assert found == {"compared": 3, "differ": ["merge/merged/3", "sft/code/2"]}


def test_unfinished_work_and_temporary_files_are_found(tmp_path: Path) -> None:
    for folder in ("cache/0123abcd", "tmp/ray/session", "tmp/empty"):
        (tmp_path / folder).mkdir(parents=True)
    assert chaos.files_left(tmp_path) == []
    left = [Path(storage.scratch(str(tmp_path / "cache"))), tmp_path / "tmp/a/checkpoint"]
    left[1].parent.mkdir()
    left[1].write_text("weights")
    assert chaos.files_left(tmp_path) == [str(path) for path in left]


def test_every_kind_of_mistake_is_told() -> None:
    nothing = {"compared": 1, "differ": []}
    good = {
        **{"differ": nothing, "differ_again": nothing, "groups_left": [], "processes_left": []},
        **{"files_left": [], "prompts": {"math": {"planned": 9, "left_out": 0, "repeated": 0}}},
    }
    assert chaos.mistakes(good) == []
    for wrong in (
        {"differ": {"compared": 1, "differ": ["sft/math/1"]}},
        {"differ_again": {"compared": 1, "differ": ["merge/merged/3"]}},
        {"groups_left": ["engine"]},
        {"processes_left": ["ray::RolloutEngine"]},
        {"files_left": ["/tmp/checkpoint"]},
        {"prompts": {"math": {"planned": 9, "left_out": 1, "repeated": 0}}},
        {"prompts": {"math": {"planned": 9, "left_out": 0, "repeated": 2}}},
    ):
        assert len(chaos.mistakes(good | wrong)) == 1, wrong


@pytest.mark.slow
@pytest.mark.cluster
def test_a_short_campaign_costs_nothing_but_time(tmp_path: Path) -> None:
    without = [f"experts.{name}=null" for name in ("math", "tool_use", "safety")]
    command = [sys.executable, "jobs/chaos.py", "conf/chaos.yaml", f"storage={tmp_path}", *without]
    done = subprocess.run(
        [*command, "--faults", "6", "--seed", "1"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    [found] = tmp_path.glob("chaos/*/chaos.json")
    found = json.loads(found.read_text())
    assert len(found["faults"]) == 6 and found["differ"]["compared"] > 5
    assert found["differ_again"]["compared"] == 2 and found["prompts"]["code"]["planned"] > 0
