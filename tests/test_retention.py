"""What may be deleted from a storage, and what never."""

import subprocess
import sys
from pathlib import Path

import pytest

from bar_ray import registry, retention, storage
from bar_ray.cluster.lease import Lease
from bar_ray.graph import Step
from bar_ray.registry import Version
from bar_ray.retention import Keep
from bar_ray.types import UserError

AT_ONCE = Keep(runs=1, versions=1, younger_than_s=-60)


class Store:
    """A storage with a base, experts made from it, and what work leaves behind."""

    def __init__(self, root: str, scratch: Path) -> None:
        self.root, self.scratch = root, scratch
        self.base = self.step("train", "base", 0)
        self.made = {n: self.step("sft", "math", n, {"model": self.base}) for n in range(4)}
        for step in (self.base, *self.made.values()):
            self.commit(step)

    def step(self, verb: str, name: str, lr: int, inputs: dict | None = None) -> Step:
        return Step(verb, name, {"lr": lr}, inputs or {}, storage_uri=self.root)

    def commit(self, step: Step, uri: str = "", data: dict | None = None) -> None:
        folder = self.scratch / "work"
        folder.mkdir()
        (folder / "weights").write_text(step.fingerprint)
        inputs = {name: s.fingerprint for name, s in step.inputs.items()}
        info = {"inputs": inputs, "data": data or {}}
        storage.commit(str(folder), uri or step.artifact.uri, info)

    def planned(self, run: str, started: float, *steps: Step) -> None:
        plan = [{"fingerprint": step.fingerprint} for step in steps]
        described = {"run_id": run, "started": started, "plan": plan}
        storage.write_json(storage.join(self.root, "runs", run, "run.json"), described)

    def publish(self, step: Step, overall: float) -> None:
        lineage = (f"train base {self.base.fingerprint}",)
        version = Version("", step.fingerprint, lineage, {"overall": overall})
        registry.publish(self.root, "math", version)

    def garbage(self, *steps: Step, keep: Keep = AT_ONCE) -> dict[str, str]:
        """Path -> reason."""
        found = retention.garbage(self.root, steps, keep)
        base = self.root.partition("?")[0]
        return {item.uri.partition("?")[0].removeprefix(f"{base}/"): item.reason for item in found}

    def path(self, step: Step, kind: str = "artifacts") -> str:
        return f"{kind}/{step.verb}/{step.name}/{step.fingerprint}"


@pytest.fixture
def store(root: str, tmp_path: Path) -> Store:
    return Store(root, tmp_path)


def test_what_nothing_refers_to_may_go(store: Store) -> None:
    old, planned, recent, mine = store.made.values()
    store.planned("1", 1.0, old)
    store.planned("2", 2.0, planned, store.base)
    found = store.garbage(mine)
    assert found == {store.path(s): "nothing refers to it" for s in (old, recent)}
    assert store.garbage(mine, keep=Keep(2, 1, -60)).keys() == {store.path(recent)}
    assert store.garbage(mine, keep=Keep(1, 1, 60)) == {}


def test_versions_of_an_expert_stay_with_what_they_were_made_from(store: Store) -> None:
    for step, overall in zip(store.made.values(), (10.0, 90.0, 20.0, 30.0), strict=True):
        store.publish(step, overall)
    # The best and the newest stay.
    assert store.garbage().keys() == {store.path(store.made[n]) for n in (0, 2)}
    assert store.path(store.base) in store.garbage(keep=Keep(1, 0, -60))


def test_what_a_kept_artifact_was_made_from_stays(store: Store) -> None:
    store.planned("1", 1.0, store.made[0])  # and nothing says what that needs but its manifest
    assert store.garbage().keys() == {store.path(store.made[n]) for n in (1, 2, 3)}


def test_data_that_a_kept_artifact_was_made_from_stays(store: Store) -> None:
    rollouts = store.step("rollouts", "math", 0)
    store.commit(rollouts)
    trained = store.step("rlvr", "math", 0, {"model": store.made[0]})
    store.commit(trained, data={"replay": [rollouts.artifact.uri, "content"]})
    kept = {store.path(s) for s in (trained, rollouts, store.made[0], store.base)}
    assert not kept & store.garbage(trained).keys()


def test_what_work_left_behind_may_go_unless_it_can_continue(store: Store, tmp_path: Path) -> None:
    done, running, forgotten = (
        store.made[0],
        store.step("sft", "code", 1),
        store.step("sft", "x", 2),
    )
    for step in (done, running, forgotten):
        uri = storage.join(store.root, store.path(step, "checkpoints"), "step-00000010")
        store.commit(step, uri)
    for path in ("checkpoints/ray_train/sft-code-1/snapshot.json", "quarantine/sft/code/f/s/w"):
        storage.write_bytes(storage.join(store.root, path), b"x")
    storage.write_bytes(storage.join(store.root, "model", "config.json"), b"{}")
    found = store.garbage(*store.made.values(), running)
    assert found == {
        store.path(done, "checkpoints"): "of a finished step",
        store.path(forgotten, "checkpoints"): "of a step nobody plans",
        "checkpoints/ray_train/sft-code-1": "of a run that has ended",
        "quarantine/sft/code/f": "damaged",
    }
    for item in retention.garbage(store.root, [running, *store.made.values()], AT_ONCE):
        storage.delete(item.uri)
    assert store.garbage(*store.made.values(), running) == {}
    assert storage.exists(storage.join(store.root, store.path(running, "checkpoints")))


def test_an_unknown_lineage_stops_it(store: Store) -> None:
    place = storage.join(store.made[0].artifact.uri, storage.MANIFEST)
    storage.write_bytes(place, storage.read_bytes(place).replace(b"inputs", b"imputs"))
    with pytest.raises(UserError, match="was made from is unknown"):
        store.garbage(store.made[0])


def test_the_job_plans_deletes_and_stays_away_from_a_run(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), tmp_path)
    artifacts = tmp_path / "store" / "artifacts"
    unfinished = artifacts / ".sft.tmp-nowhere-1-01234567"
    unfinished.mkdir()

    def collect(*arguments: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "jobs/gc.py", "conf/tiny.yaml", f"storage={store.root}"]
        command += ["--older-than", "0", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    planned = collect("--plan")
    assert planned.stdout.count("nothing refers to it") == 5 and "5 to delete" in planned.stdout
    assert storage.read_manifest(store.base.artifact.uri)
    with Lease(store.root, "run", [store.base]).taken():
        refused = collect()
        assert refused.returncode == 2 and "run run of " in refused.stderr
    assert "5 deleted, 0.0 MB" in collect().stdout
    assert storage.read_manifest(store.base.artifact.uri) is None
    assert unfinished.exists(), "it may belong to a process of another machine"
