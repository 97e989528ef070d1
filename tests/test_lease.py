"""Two drivers on one storage: who may go on, who is told what, and what becomes of the dead."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from bar_ray import storage
from bar_ray.cluster import lease
from bar_ray.cluster.lease import Lease, LeaseLost
from bar_ray.graph import Step
from bar_ray.types import UserError

TTL_S = 1.0  # a rival elsewhere is believed for 1.5 s: longer than a busy machine stalls


def step(name: str, root: str = "/store") -> Step:
    return Step("sft", name, {"lr": 1}, storage_uri=root)


def make(root: str, run_id: str, *names: str) -> Lease:
    return Lease(root, run_id, [step(name) for name in names], TTL_S)


def refuse(wanted: Lease, reason: str, said: list[str] | None = None) -> None:
    say = ([] if said is None else said).append
    with pytest.raises(UserError, match=reason), wanted.taken(say):
        pass


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every lease seems to come from another machine, so only renewals tell who lives."""
    monkeypatch.setattr(lease, "_is_here", lambda record: False)


def test_a_second_driver_is_told_who_is_at_work(root: str) -> None:
    with make(root, "b", "math", "code").taken():
        refuse(make(root, "a", "math", "safety"), r"run b of .* is at work on sft math in the same")
        with make(root, "c", "safety").taken() as other:
            other.check()
    with make(root, "d", "math").taken():
        pass
    assert storage.list_files(storage.join(root, "leases")) == []


def test_a_living_driver_elsewhere_is_recognised_by_its_renewals(root: str, elsewhere: Any) -> None:
    said: list[str] = []
    with make(root, "b", "math").taken():
        started = time.monotonic()
        refuse(make(root, "a", "math"), "is at work on sft math", said)
        assert time.monotonic() - started < 10
    assert len(said) == 1 and "may be at work; waiting up to" in said[0]


def test_a_slow_renewal_does_not_bring_a_lease_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, begun = storage.write_json, threading.Event()

    def slow(uri: str, value: Any) -> None:
        if value["held"] and threading.current_thread() is not threading.main_thread():
            begun.set()
            time.sleep(3 * TTL_S)
        write(uri, value)

    monkeypatch.setattr(storage, "write_json", slow)
    with make(str(tmp_path), "a", "math").taken():
        assert begun.wait(10)
    time.sleep(3 * TTL_S)
    assert storage.list_files(storage.join(str(tmp_path), "leases")) == []


def test_the_steps_of_a_killed_driver_are_free_at_once(tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, 'tests'); from test_lease import make\n"
        f"with make({str(tmp_path)!r}, 'a', 'math').taken():\n"
        "    print('taken', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as driver:
        assert driver.stdout is not None and driver.stdout.readline() == b"taken\n"
        refuse(make(str(tmp_path), "b", "math"), f"process {driver.pid}")
        driver.send_signal(signal.SIGKILL)
    said: list[str] = []
    with make(str(tmp_path), "b", "math").taken(said.append):
        assert "is gone: this run goes on with its steps" in said[0]


def test_a_silent_driver_is_replaced_and_learns_of_it(root: str, elsewhere: Any) -> None:
    silent = make(root, "a", "math")
    awake = threading.Event()
    write = silent._write

    def stopped(**changed: Any) -> None:
        if silent.record["held"]:
            awake.wait()
        write(**changed)

    silent._write = stopped  # type: ignore[method-assign]
    with silent.taken():
        silent.check()
        with make(root, "b", "math").taken() as successor:
            awake.set()
            deadline = time.monotonic() + 10
            with pytest.raises(LeaseLost, match=r"run b of .* goes on"):
                while time.monotonic() < deadline:
                    silent.check()
                    time.sleep(0.05)
            successor.check()


def test_of_many_at_once_one_gets_the_lease(root: str, elsewhere: Any) -> None:
    """And it is never given to two at a time."""
    inside, most, won, refused = 0, 0, [], []
    lock = threading.Lock()

    def drive(name: str) -> None:
        nonlocal inside, most
        try:
            with make(root, name, "math").taken(lambda _: None):
                with lock:
                    inside += 1
                    most = max(most, inside)
                won.append(name)
                time.sleep(2)
                with lock:
                    inside -= 1
        except UserError:
            refused.append(name)

    threads = [threading.Thread(target=drive, args=(f"run-{n}",)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert most == 1 and len(won) >= 1 and len(won) + len(refused) == 6


def test_a_storage_that_stops_answering_ends_the_driver(tmp_path: Path, elsewhere: Any) -> None:
    mine = make(str(tmp_path), "a", "math")
    with mine.taken():
        folder = tmp_path / "leases"
        os.rename(folder, tmp_path / "away")
        folder.write_text("not a folder")
        deadline = time.monotonic() + 10
        with pytest.raises(LeaseLost, match="could not be renewed"):
            while time.monotonic() < deadline:
                mine.check()
                time.sleep(0.05)


def test_a_lease_that_cannot_be_read_is_not_taken_for_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(uri: str) -> Any:
        raise storage.StorageError(f"cannot read {uri}") from ConnectionError("reset")

    with make(str(tmp_path), "a", "math").taken():
        monkeypatch.setattr(storage, "read_json", unreachable)
        refuse(make(str(tmp_path), "b", "math"), "cannot read")


def test_keys_in_the_command_are_kept_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job.py", "storage=s3://key:secret@bkt/run"])
    assert make(str(tmp_path), "a", "math").record["command"] == "job.py storage=s3://bkt/run"
