"""The bench itself: it must see a leak and a mistake when there is one."""

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bar_ray.bench import rlvr, rounds, sandbox
from bar_ray.recipe import Grpo, Rlvr
from bar_ray.rewards.sandbox import Call, Run, Sandbox
from bar_ray.types import UserError


@pytest.fixture(scope="module")
def usable() -> None:
    try:
        Sandbox(first_uid=sandbox.FIRST_UID).prove()
    except UserError as error:
        pytest.skip(str(error))


def test_sandboxes_in_parallel_leave_nothing_behind(
    usable: None, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "COMPARED", 6)
    monkeypatch.setattr(sandbox, "WARM_UP_S", 3.0)
    results = sandbox.run(3, 12.0, str(tmp_path))
    assert results["mistakes"] == []
    assert results["outcomes"]["honest right"] > 5
    assert sum(n for o, n in results["outcomes"].items() if o.startswith("hostile")) > 2
    before, after = results["before"], results["after"]
    assert after["processes"] == before["processes"]
    assert after["descriptors"] == before["descriptors"]
    assert after["resident_mib"] < before["resident_mib"] + 20
    assert "mistakes: 0" in sandbox.table(results)


def test_a_program_that_gets_its_way_is_a_mistake(usable: None) -> None:
    class Broken:
        """Answers as if every program had succeeded."""

        def run(self, program: str, entry_point: str, inputs: list[Any]) -> Run:
            return Run("done", (Call(True, 1),))

    _, mistakes = sandbox._use(Broken(), 1, 0.05)
    assert {mistake.split(":")[0] for mistake in mistakes} > {"daemon", "network", "host files"}


def test_a_process_that_stays_is_seen(usable: None) -> None:
    before = sandbox._left(1).processes
    stays = subprocess.Popen(["sleep", "60"])
    try:
        assert sandbox._left(1).processes == before + 1
    finally:
        stays.kill()
        stays.wait()


def allocating(mib: int) -> Callable[[], None]:
    def act() -> None:
        bytes(bytearray(b"x") * (mib * 2**20))

    return act


def test_peak_memory_is_that_of_the_work_alone() -> None:
    """A process that was started takes over the peak of who started it, where one is careless."""
    held = bytearray(b"x") * (600 * 2**20)
    peak, more = rounds.peak_mib(allocating, 100)
    assert 190 < more < 240, "two copies of 100 MiB"
    assert peak < 500 < len(held) / 2**20


def test_rows_are_read_back_as_they_were_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = pytest.importorskip("bar_ray.bench.sampling", reason="needs bar_ray[bench]")
    sizes = {"TRAINING_ROWS": 64, "ROW_TOKENS": 32, "BATCH": 4, "STEPS": 3}
    for name, size in sizes.items():
        monkeypatch.setattr(sampling, name, size)
    row = sampling._loading(tmp_path, 1)
    assert row.seconds > 0 and [each.peer for each in row.ratios] == ["datasets with a DataLoader"]


def test_figures_of_a_run_come_from_its_metrics() -> None:
    rows = [
        {
            **{"time": 100.0 + 2 * n, "seconds": 2.0, "reward": n / 10, "rollout_wait_s": 0.5},
            **{"engines_idle": 0.25, "rollout_tokens": 300, "generate_s": 1.5, "length": 10.0},
            **{"staleness": 1.0, "staleness_max": n, "requeued": n, "sync_s": 0.1, "sync_mb": 4.0},
        }
        for n in range(11)
    ]
    side = rlvr._side(rows, Rlvr(batch_size=4, grpo=Grpo(samples=8)))
    assert side["steps_per_min"] == pytest.approx(30)
    assert side["samples_per_s"] == pytest.approx(16)
    assert side["rollout_tokens_per_s"] == pytest.approx(200)
    assert side["learner_waits"] == pytest.approx(0.25)
    assert (side["reward_first"], side["reward_last"]) == (pytest.approx(0.2), pytest.approx(0.8))
    assert (side["staleness_max"], side["requeued"]) == (10, 10)


@pytest.mark.parametrize(("room_s", "counted"), [(0.0, 3), (60.0, 5)])
def test_a_slow_machine_has_fewer_rounds_but_some(
    room_s: float, counted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rounds, "ROOM_S", room_s)
    calls = {"ours": 0, "peer": 0}

    def side(name: str) -> Callable[[], float]:
        def act() -> float:
            calls[name] += 1
            return 1.0 if name == "ours" else 2.0

        return act

    row = rounds.measure("x", {name: side(name) for name in calls}, 5)
    assert set(calls.values()) == {counted + 1}  # one is not counted
    assert row.ratios[0].shown == "2.00 (2.00 to 2.00)" and row.about["rounds"] == str(counted)
