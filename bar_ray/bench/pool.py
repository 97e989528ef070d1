"""The shared pool: how long three experts of different length take together.

Real Ray, Ray Train and pool on a cluster of logical GPUs; the training itself is simulated, as time
that goes by: `n` workers do `n` GPU-seconds of work a second, up to as many as a global batch has
parts for. So the makespan can be compared with its lower bound, with one expert after another and
with an equal share for each. Starting processes takes real time: the arms start different numbers.
"""

import itertools
import json
import math
import os
import tempfile
import threading
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
from ray.cluster_utils import Cluster
from ray.train import RunConfig, ScalingConfig

from bar_ray import storage
from bar_ray.cluster import session
from bar_ray.cluster.quota import Demand, Group
from bar_ray.cluster.scaling import PoolTrainer
from bar_ray.cluster.sharing import PoolClient
from bar_ray.report import svg

STEP_S, ASK_EVERY, POLL_S = 0.5, 4, 0.5
GPUS, MOST = 6, 4
RESIZE_S = 10.0


@dataclass(frozen=True)
class Job:
    """An expert: so many GPU-seconds of training, on at most `MOST` GPUs."""

    name: str
    work: float


JOBS = (Job("long", 480.0), Job("middle", 240.0), Job("short", 60.0))


@dataclass(frozen=True)
class Arm:
    """A way to share the GPUs: each job gets `low` to `high` of them."""

    name: str
    low: int
    high: int
    by_work: bool = False  # a job's weight in the pool is its work, or else 1


ARMS = (
    Arm("shared pool", 1, MOST),
    Arm("shared pool, weighted by work", 1, MOST, by_work=True),
    Arm("one after another", MOST, MOST),
    Arm("equal shares", GPUS // len(JOBS), GPUS // len(JOBS)),
)


def loop(config: dict[str, Any]) -> None:
    """One worker. The first one asks the pool, saves when it wants another size, and counts."""
    job, place, pool = config["job"], Path(config["checkpoint"]), PoolClient()
    done = json.loads(place.read_text()) if place.exists() else 0.0
    context = ray.train.get_context()
    world, is_first = context.get_world_size(), context.get_world_rank() == 0
    for step in range(math.ceil((job.work - done) / (world * STEP_S))):
        time.sleep(STEP_S)
        done += world * STEP_S
        if is_first and step % ASK_EVERY == 0:
            left = (job.work - done) / world
            wants = pool.ask("wants_change", config["holder"], "workers", left, 0.0, default=False)
            if wants:
                place.write_text(json.dumps(done))
                pool.ask("saved", config["holder"], "workers")


def train(job: Job, demand: Demand, folder: Path) -> None:
    group = demand.groups["workers"]
    checkpoint = folder / f"{demand.holder.replace('/', '-')}.json"
    PoolTrainer(
        loop,
        demand.holder,
        train_loop_config={"job": job, "holder": demand.holder, "checkpoint": str(checkpoint)},
        scaling_config=ScalingConfig(
            num_workers=(group.low, group.high), use_gpu=True, resources_per_worker={"GPU": 1}
        ),
        run_config=RunConfig(name=demand.holder.replace("/", "-"), storage_path=str(folder)),
    ).fit()


def makespan(arm: Arm, folder: Path) -> dict[str, Any]:
    """Run all jobs: seconds, how often workers were started, and each job's workers over time."""
    pool, run_id = PoolClient(create=True), uuid.uuid4().hex[:8]
    jobs = {f"{run_id}/{job.name}": job for job in JOBS}
    demands = {
        name: Demand(
            name,
            job.name,
            {"workers": Group({"GPU": 1.0}, arm.low, arm.high)},
            weight=job.work if arm.by_work else 1.0,
        )
        for name, job in jobs.items()
    }
    waiting, running = list(demands), dict[str, threading.Thread]()
    sizes: dict[str, list[tuple[float, int]]] = {job.name: [(0.0, 0)] for job in JOBS}
    started = time.monotonic()
    while waiting or running:
        ended = [name for name, thread in running.items() if not thread.is_alive()]
        for name in ended:
            del running[name]
            sizes[jobs[name].name].append((time.monotonic() - started, 0))
        asked = [demands[n] for n in running], [demands[n] for n in waiting]
        answer = pool.ask("declare", run_id, *asked, RESIZE_S, default={})
        for name in [n for n in waiting if n in answer and answer[n].may_run]:
            waiting.remove(name)
            thread = threading.Thread(target=train, args=(jobs[name], demands[name], folder))
            running[name] = thread
            thread.start()
        for name in running:
            known = sizes[jobs[name].name]
            held = answer[name].held["workers"] if name in answer else 0
            if known[-1][1] != held:
                known.append((time.monotonic() - started, held))
        time.sleep(POLL_S)
    pool.ask("leave", run_id)
    changes = sum(count > 0 for known in sizes.values() for _, count in known)
    return {"seconds": time.monotonic() - started, "starts": changes, "workers": sizes}


def bound() -> float:
    """No schedule is faster: the longest job on as many GPUs as it can use, or all work on all."""
    return max(*(job.work / MOST for job in JOBS), sum(job.work for job in JOBS) / GPUS)


def run(root: str) -> dict[str, Any]:
    """Every arm on the same cluster, one after the other."""
    head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
    os.environ |= session.RAY_ENVIRONMENT
    cluster = Cluster(initialize_head=True, head_node_args=head)
    found: dict[str, Any] = {"gpus": GPUS, "bound_s": bound()}
    found["work"] = {job.name: job.work for job in JOBS}
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=4, num_gpus=GPUS // 2)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
        with tempfile.TemporaryDirectory() as folder:
            for arm in ARMS:
                print(f"{arm.name}: {arm.low} to {arm.high} workers each", flush=True)
                found[arm.name] = makespan(arm, Path(folder))
    finally:
        ray.shutdown()
        cluster.shutdown()
    storage.write_json(storage.join(root, "pool.json"), found)
    storage.write_bytes(storage.join(root, "pool.html"), page(found).encode())
    return found


def page(found: dict[str, Any]) -> str:
    """Who held what over time, a chart per arm, in the colours of the report."""
    css = (Path(svg.__file__).parent / "page.css").read_text()
    legend = [
        f'<span><i class="dot" style="background: var(--s{number})"></i>'
        f"{job}: {work:.0f} GPU-seconds</span>"
        for number, (job, work) in enumerate(found["work"].items())
    ]
    parts = [f"<style>{css}:root {{--s0: #4269d0; --s1: #efb118; --s2: #ff725c}}</style>"]
    parts += [f"<h1>Three experts on {found['gpus']} GPUs, at most {MOST} each</h1>"]
    parts += [f'<p class="legend">{" ".join(legend)}</p>']
    longest = max(found[arm.name]["seconds"] for arm in ARMS)
    for name in (arm.name for arm in ARMS):
        lanes = [
            (job, f"var(--s{number})", blocks(changes))
            for number, (job, changes) in enumerate(found[name]["workers"].items())
        ]
        parts += [f"<h2>{name}: {found[name]['seconds']:.0f} s</h2>"]
        parts += [str(svg.stacked(lanes, longest, "GPUs held"))]
    return "\n".join(parts)


def blocks(changes: list[tuple[float, int]]) -> list[svg.Block]:
    return [svg.Block(at, end, n) for (at, n), (end, _) in itertools.pairwise(changes) if n]


def table(found: dict[str, Any]) -> str:
    bound_s = found["bound_s"]
    lines = [
        f"lower bound: {bound_s:.0f} s for {found['work']} GPU-seconds on {found['gpus']} GPUs"
    ]
    for name in (arm.name for arm in ARMS):
        seconds, starts = found[name]["seconds"], found[name]["starts"]
        of_bound = f"{seconds / bound_s:.2f} of the bound"
        lines.append(f"{name:<29}  {seconds:6.0f} s  {of_bound}  {starts} starts")
    for job, changes in found["shared pool"]["workers"].items():
        shown = ", ".join(f"{count} from {at:.0f} s" for at, count in changes)
        lines.append(f"  {job}: {shown}")
    return "\n".join(lines)
