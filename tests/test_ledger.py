"""Checkpoints of a stage: the newest whole one wins, and only damage costs one."""

import os
import threading
from pathlib import Path

import pytest

from bar_ray import storage
from bar_ray.graph import Step
from bar_ray.train.ledger import Ledger


@pytest.fixture
def ledger(root: str, tmp_path: Path) -> Ledger:
    """A ledger with checkpoints at steps 1, 2 and 3."""
    ledger = Ledger(Step("sft", "math", {}, storage_uri=root))
    for step in (1, 2, 3):
        folder = tmp_path / "work"
        folder.mkdir()
        (folder / "weights").write_text(f"weights of {step} in {root}")
        ledger.commit(str(folder), step, {})
    return ledger


def test_the_two_newest_are_kept(ledger: Ledger) -> None:
    assert ledger.steps() == [2, 3]
    assert ledger.newest() == (3, [])
    assert Path(ledger.folder(3), "weights").read_text().startswith("weights of 3 in")


def test_more_may_be_kept_and_the_best_one(root: str, tmp_path: Path) -> None:
    ledger = Ledger(Step("sft", "code", {}, storage_uri=root), keep_last=3)
    for step in range(1, 7):
        folder = tmp_path / "work"
        folder.mkdir()
        (folder / "weights").write_text(f"weights of {step} in {root}, more of them")
        ledger.commit(str(folder), step, {}, keep=2)
    assert ledger.steps() == [2, 4, 5, 6]


def test_a_damaged_checkpoint_is_set_aside_for_the_one_before(ledger: Ledger) -> None:
    everything = storage.list_files(storage.join(ledger.uri, "step-00000003"), recursive=True)
    [flipped] = [uri for uri in everything if "weights" in uri]
    storage.write_bytes(flipped, b"weights of 4")
    step, [warning] = ledger.newest()
    assert step == 2 and "step 3 is set aside in" in warning and "is damaged" in warning
    assert ledger.steps() == [2]
    kept = storage.list_files(ledger.quarantine, recursive=True)
    assert [storage.read_bytes(f) for f in kept if "weights" in f] == [b"weights of 4"]


def test_an_upload_without_its_manifest_is_no_checkpoint(ledger: Ledger) -> None:
    orphan = storage.join(ledger.uri, "step-00000004", "data-0123456789ab", "weights")
    storage.write_bytes(orphan, b"weights of 4")
    assert ledger.newest() == (3, [])


def test_an_upload_goes_on_beside_training(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    may_end, told = threading.Event(), []
    commit = storage.commit
    monkeypatch.setattr(storage, "commit", lambda *a: may_end.wait(30) and commit(*a))
    folder = storage.scratch(str(tmp_path / "staging"))
    Path(folder, "weights").write_text(f"weights of 4 in {ledger.uri}")
    ledger.begin_commit(folder, 4, keep=2, then=lambda: told.append(4))
    assert ledger.steps() == [2, 3] and not told
    may_end.set()
    ledger.wait()
    assert told == [4] and ledger.steps() == [2, 3, 4] and not os.path.exists(folder)


def test_a_failed_upload_is_told_at_the_next_one(ledger: Ledger, tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    ledger.begin_commit(str(folder), 4, keep=0, then=lambda: None)
    with pytest.raises(storage.StorageError, match=r"gone: it is not a directory"):
        ledger.wait()
    ledger.wait()  # once is enough
    assert ledger.newest() == (3, [])


def test_a_storage_that_does_not_answer_costs_no_checkpoint(
    ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(uri: str) -> str:
        raise storage.StorageError(f"cannot read {uri}: timeout")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "fetch", unreachable)
        with pytest.raises(storage.StorageError, match="timeout"):
            ledger.newest()
    assert ledger.newest() == (3, [])
