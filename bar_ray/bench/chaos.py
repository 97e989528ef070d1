"""Faults at random while a whole run is at work, and what is left of it in the end.

A run on object storage and a cluster of several raylets is hit again and again: workers, engines,
controllers, drivers and machines are killed, frozen or drained, the storage fails, is slow, is
full. The driver is started again with the same command whenever it has ended. In the end its
artifacts are compared with those of a run that was left alone.
"""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import ray
from ray._raylet import GcsClient
from ray.cluster_utils import Cluster
from ray.core.generated import autoscaler_pb2

from bar_ray import pipeline, storage
from bar_ray.bench.outages import Faulty, serving
from bar_ray.config import dump
from bar_ray.graph import VERBS, topological
from bar_ray.log import duration
from bar_ray.recipe import Recipe
from bar_ray.report import history

NUM_NODES = 2
DRAIN_S, FROZEN_S, OUTAGE_S = 12.0, 8.0, 6.0
MIN_GAP_S, MAX_GAP_S = 8.0, 32.0
END_S = 60.0
FAST = {
    **{"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "1", "RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S": "1"},
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "60",
}
# What Ray's processes call themselves -> what is done to one of them
KILLED = {
    **{"RayTrainWorker": "training worker", "RolloutEngine": "rollout engine"},
    **{"SamplerActor": "sampler", "Grader": "grader", "TrainController": "controller"},
    **{"PoolActor": "pool", "Journal": "journal", f"({'|'.join(VERBS)})-": "step"},
}
FROZEN = ("RayTrainWorker", "RolloutEngine")
# Of a machine that is gone: Ray's own, which take minutes to notice.
AGENTS = ("ray::DashboardAgent", "ray::RuntimeEnvAgent")
AFTER_RLVR = ("merge", "route", "evaluate")
SAMPLED = ("rlvr", *AFTER_RLVR)  # not bitwise: engines batch as they can


@dataclass(frozen=True)
class Fault:
    """Something that was done to a run, `at` seconds after its start."""

    at: float
    kind: str


class Machines:
    """A head that takes no work and a few nodes, on this machine."""

    def __init__(self) -> None:
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
        self.cluster = Cluster(initialize_head=True, head_node_args=head)
        self.nodes = [self.cluster.add_node(num_cpus=1) for _ in range(NUM_NODES)]

    def lose(self, node: Any) -> None:
        """A machine dies; another one comes."""
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        self.nodes.append(self.cluster.add_node(num_cpus=1))

    def drain(self, node: Any) -> None:
        """A machine is taken away after a notice; another one comes before it goes."""
        self.nodes.append(self.cluster.add_node(num_cpus=1))
        reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
        deadline = int((time.time() + DRAIN_S) * 1000)
        GcsClient(address=self.cluster.address).drain_node(node.node_id, reason, "spot", deadline)
        time.sleep(DRAIN_S)
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)

    def processes(self) -> list[psutil.Process]:
        """Everything that runs under the raylets."""
        found = []
        for node in self.cluster.list_all_nodes():
            for each in node.all_processes.get("raylet", []):
                with contextlib.suppress(psutil.Error):
                    found += psutil.Process(each.process.pid).children(recursive=True)
        return found

    def victims(self) -> dict[str, list[psutil.Process]]:
        """What can be killed, by the names in `KILLED`."""
        found = defaultdict(list)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                for name in KILLED:
                    if re.match(f"ray::{name}", words):
                        found[name].append(process)
        return found

    def drive(self, recipe: Path, place: str, said: Any = None) -> subprocess.Popen:
        """Start a driver of the whole recipe on a storage; `said` takes what it complains of."""
        command = [sys.executable, "jobs/train_all.py", str(recipe), f"storage={place}"]
        command += [f"cluster.address={self.cluster.address}"]
        env = {**os.environ, **FAST}
        return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=said)

    def end(self) -> None:
        self.cluster.shutdown()


class Campaign:
    """One run under fire.

    Args:
        place: the storage of the run, with its query.
        limit: how many faults.
    """

    def __init__(self, recipe: Path, place: str, faulty: Faulty, limit: int, seed: int) -> None:
        self.recipe, self.place, self.faulty, self.limit = recipe, place, faulty, limit
        self.draw = random.Random(seed)
        self.machines = Machines()
        self.faults: list[Fault] = []
        self.exits: list[str] = []
        self.seen: set[psutil.Process] = set()
        self.started = time.monotonic()

    def run(self) -> None:
        """Until the run has finished."""
        pause = self._pause()
        while True:
            with tempfile.TemporaryFile("w+") as said:
                driver = self.machines.drive(self.recipe, self.place, said)
                self.seen.add(psutil.Process(driver.pid))
                while driver.poll() is None:
                    self.seen.update(self.machines.processes())
                    if time.monotonic() > pause and len(self.faults) < self.limit:
                        self._strike(driver)
                        pause = self._pause()
                    time.sleep(0.5)
                if driver.returncode == 0:
                    return
                said.seek(0)
                last = (said.read().strip().splitlines() or ["killed"])[-1]
            self.exits.append(last)
            print(f"  the driver ended ({driver.returncode}): {last:.120}", flush=True)
            if len(self.exits) > self.limit + 3:
                raise RuntimeError(f"the run does not come to an end: {last}")

    def _pause(self) -> float:
        return time.monotonic() + self.draw.uniform(MIN_GAP_S, MAX_GAP_S)

    def _strike(self, driver: subprocess.Popen) -> None:
        kinds = dict(self._possible(driver))
        known = Counter(fault.kind for fault in self.faults)
        rarest = min(known[kind] for kind in kinds)  # what can seldom be done comes when it can
        kind = self.draw.choice(sorted(kind for kind in kinds if known[kind] == rarest))
        at = time.monotonic() - self.started
        print(f"  {duration(at):>8}  {kind}", flush=True)
        self.faults.append(Fault(at, kind))
        with contextlib.suppress(psutil.Error):
            kinds[kind]()

    def _possible(self, driver: subprocess.Popen) -> Iterator[tuple[str, Callable[[], None]]]:
        """What can be done now, by its name."""
        machines, draw, faulty = self.machines, self.draw, self.faulty
        for name, victims in machines.victims().items():
            victim, shown = draw.choice(victims), KILLED[name]
            yield f"{shown} killed", victim.kill
            if name in FROZEN:
                yield f"{shown} frozen for {FROZEN_S:.0f} s", lambda v=victim: self._freeze(v)
        node = draw.choice(machines.nodes)
        yield "machine lost", lambda: machines.lose(node)
        yield f"machine drained, {DRAIN_S:.0f} s notice", lambda: machines.drain(node)
        yield "driver killed", driver.kill
        yield "cluster lost", lambda: self._lose_cluster(driver)
        for kind, fault in {
            "storage unavailable": lambda: faulty.fail(10**9, "503 Slow Down", "SlowDown"),
            "storage slow": lambda: faulty.slow(1.0),
            "storage full": lambda: faulty.fail(10**9, "403 Forbidden", "QuotaExceeded", "PUT"),
        }.items():
            yield f"{kind} for {OUTAGE_S:.0f} s", lambda f=fault: self._outage(f)

    def _freeze(self, victim: psutil.Process) -> None:
        victim.send_signal(signal.SIGSTOP)
        time.sleep(FROZEN_S)
        victim.send_signal(signal.SIGCONT)

    def _outage(self, fault: Callable[[], None]) -> None:
        fault()
        time.sleep(OUTAGE_S)
        self.faulty.work()

    def _lose_cluster(self, driver: subprocess.Popen) -> None:
        """All machines at once, the driver's among them; another cluster is started."""
        driver.kill()
        self.machines.end()
        self.machines = Machines()

    # --- what is left ----------------------------------------------------------------------------

    def groups_left(self) -> list[str]:
        """Placement groups that nobody removed."""
        ray.init(address=self.machines.cluster.address, log_to_driver=False, logging_level="ERROR")
        try:
            table = ray.util.placement_group_table().values()
            return [group["name"] for group in table if group["state"] != "REMOVED"]
        finally:
            ray.shutdown()

    def processes_left(self) -> list[str]:
        """What outlives the cluster."""
        _, alive = psutil.wait_procs(list(self.seen), timeout=END_S)
        left = []
        for process in alive:
            with contextlib.suppress(psutil.Error):
                left.append(" ".join(process.cmdline())[:80])
        return [words for words in left if not words.startswith(AGENTS)]


def files_left(folder: Path) -> list[str]:
    """Unfinished work in the cache and in shared memory, and temporary files that hold anything."""
    hidden = [*folder.glob("cache/.*"), *Path("/dev/shm").glob("bar_ray-*/.*")]
    not_ours = ("ray", "torchinductor")
    temporary = [p for p in (folder / "tmp").iterdir() if not p.name.startswith(not_ours)]
    full = [p for top in temporary for p in (top, *top.rglob("*")) if p.is_file()]
    return [str(p) for p in (*hidden, *full) if p.is_dir() or p.stat().st_size]


def calm(recipe: Path, place: str) -> None:
    """The same run, left alone."""
    machines = Machines()
    try:
        driver = machines.drive(recipe, place)
        if driver.wait():
            raise RuntimeError(f"a run that was left alone failed ({driver.returncode})")
    finally:
        machines.end()


def run(recipe: Recipe, limit: int, seed: int, root: str) -> dict[str, Any]:
    """A run left alone, one under fire, and one that repeats the last steps of the latter."""
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        serving() as (faulty, query),
    ):
        path = Path(folder, "recipe.yaml")
        path.write_text(dump(recipe))
        left_alone, hit, again = (f"s3://bkt/{n}{query}" for n in ("calm", "hit", "again"))
        os.environ |= {"BAR_RAY_CACHE": f"{folder}/cache", "TMPDIR": f"{folder}/tmp"}
        os.mkdir(f"{folder}/tmp")
        print("a run left alone", flush=True)
        started = time.monotonic()
        calm(path, left_alone)
        calm_s = time.monotonic() - started
        print(f"  {duration(calm_s)}\nthe same under fire, seed {seed}", flush=True)
        campaign = Campaign(path, hit, faulty, limit, seed)
        try:
            campaign.run()
            hit_s = time.monotonic() - campaign.started
            groups = campaign.groups_left()
        finally:
            campaign.machines.end()
        print(f"  {duration(hit_s)}\nits last steps once more, left alone", flush=True)
        copy_without(hit, again, AFTER_RLVR)
        calm(path, again)
        graph = pipeline.build(replace(recipe, storage=hit))
        steps = topological(graph.targets)
        found = {
            **{"seed": seed, "calm_s": calm_s, "hit_s": hit_s},
            "goodput": history.read(hit, steps, "").goodput(),
            "calm_goodput": history.read(left_alone, steps, "").goodput(),
            "faults": [asdict(fault) for fault in campaign.faults],
            **{"driver_exits": campaign.exits, "groups_left": groups},
            "processes_left": campaign.processes_left(),
            "files_left": files_left(Path(folder)),
            "differ": differing(left_alone, hit, lambda verb: verb not in SAMPLED),
            "differ_again": differing(again, hit, lambda verb: verb in ("merge", "route")),
            "prompts": prompts(graph),
        }
    storage.write_json(storage.join(root, "chaos.json"), found)
    return found


def copy_without(place: str, target: str, verbs: tuple[str, ...]) -> None:
    """Copy a run's artifacts, but those of some verbs."""
    for uri in storage.list_files(storage.join(place, "artifacts"), recursive=True):
        below = _below(uri)
        if below.split("/")[0] not in verbs:
            storage.write_bytes(storage.join(target, "artifacts", below), storage.read_bytes(uri))


def _below(uri: str) -> str:
    return uri.partition("?")[0].partition("/artifacts/")[2]


def artifacts(place: str) -> dict[str, str]:
    """verb/name/fingerprint -> hash of the artifact's files."""
    uris = storage.list_files(storage.join(place, "artifacts"), recursive=True)
    folders = [_below(uri).removesuffix("/MANIFEST.json") for uri in uris if "MANIFEST" in uri]
    found = {f: storage.read_manifest(storage.join(place, "artifacts", f)) for f in folders}
    return {folder: manifest.sha256 for folder, manifest in found.items() if manifest}


def differing(calm: str, hit: str, wanted: Callable[[str], bool]) -> dict[str, Any]:
    """How many artifacts of the wanted verbs were compared, and which are not bitwise equal."""
    ours, theirs = (
        {name: sha for name, sha in artifacts(place).items() if wanted(name.split("/")[0])}
        for place in (hit, calm)
    )
    names = [name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)]
    return {"compared": len(theirs), "differ": sorted(names)}


def prompts(graph: pipeline.Pipeline) -> dict[str, dict[str, int]]:
    """For each RLVR stage: how many places of the order there are, and how often they were used."""
    found = {}
    for domain, stages in graph.stages.items():
        if "rlvr" in stages:
            step = stages["rlvr"]
            stage = step.settings["stage"]
            file = Path(storage.fetch(step.artifact.uri), "consumed.json")
            used = Counter(each["place"] for part in json.loads(file.read_text()) for each in part)
            planned = range(stage.steps * stage.batch_size)
            found[domain] = {
                "planned": len(planned),
                "left_out": len(set(planned) - set(used)),
                "repeated": sum(count > 1 for count in used.values()),
            }
    return found


def mistakes(found: dict[str, Any]) -> list[str]:
    """What should not have happened, in words."""
    wrong = [f"differs from the run left alone: {name}" for name in found["differ"]["differ"]]
    wrong += [f"differs when repeated: {name}" for name in found["differ_again"]["differ"]]
    for domain, used in found["prompts"].items():
        wrong += [f"{domain}: {used[k]} prompts {k}" for k in ("left_out", "repeated") if used[k]]
    wrong += [f"process left: {name}" for name in found["processes_left"]]
    wrong += [f"file left: {name}" for name in found["files_left"]]
    return wrong + [f"placement group left: {name}" for name in found["groups_left"]]


def table(found: dict[str, Any]) -> str:
    counts = Counter(fault["kind"] for fault in found["faults"])
    lines = [f"{count:>4}  {kind}" for kind, count in sorted(counts.items())]
    equal = found["differ"]["compared"] - len(found["differ"]["differ"])
    again = found["differ_again"]["compared"] - len(found["differ_again"]["differ"])
    lines += [
        f"{len(found['faults'])} faults, seed {found['seed']}; the driver was started again "
        f"{len(found['driver_exits'])} times",
        f"bitwise equal to the run left alone: {equal} of {found['differ']['compared']} artifacts; "
        f"merge and router made again from the same experts: {again} of "
        f"{found['differ_again']['compared']}",
        f"RLVR prompts: {found['prompts']}",
        f"left behind: {len(found['processes_left'])} processes, "
        f"{len(found['groups_left'])} placement groups, {len(found['files_left'])} files",
        f"{duration(found['hit_s'])}, left alone {duration(found['calm_s'])}; "
        f"goodput {found['goodput']:.2f}, left alone {found['calm_goodput']:.2f}",
    ]
    wrong = mistakes(found)
    return "\n".join([*lines, f"mistakes: {len(wrong)}", *wrong])
