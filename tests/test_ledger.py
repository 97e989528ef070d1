"""Checkpoints of a stage: the newest whole one wins, and only damage costs one."""

from pathlib import Path

import pytest

from bar_ray import storage
from bar_ray.graph import Step
from bar_ray.train.ledger import Ledger


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    """A ledger with checkpoints at steps 1, 2 and 3."""
    ledger = Ledger(Step("sft", "math", {}, storage_uri=str(tmp_path / "store")))
    for step in (1, 2, 3):
        folder = tmp_path / "work"
        folder.mkdir()
        (folder / "weights").write_text(f"weights of {step}")
        ledger.commit(str(folder), step, {})
    return ledger


def test_the_two_newest_are_kept(ledger: Ledger) -> None:
    assert ledger.steps() == [2, 3]
    assert ledger.newest() == (3, [])
    assert Path(ledger.folder(3), "weights").read_text() == "weights of 3"


def test_a_damaged_checkpoint_is_dropped_for_the_one_before(ledger: Ledger) -> None:
    Path(ledger.folder(3), "weights").write_text("weights of 4")
    step, [warning] = ledger.newest()
    assert step == 2 and "step 3 is damaged" in warning
    assert ledger.steps() == [2]


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
