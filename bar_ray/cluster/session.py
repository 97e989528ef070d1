"""From a recipe to a finished run: plan, connect, execute, and leave the cluster as it was."""

import contextlib
import os
import platform
import secrets
import signal
import sys
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from bar_ray import estimate, storage
from bar_ray.cluster.lease import Lease
from bar_ray.config import dump
from bar_ray.graph import Planned, Step, plan, render_plan
from bar_ray.log import duration
from bar_ray.recipe import Recipe
from bar_ray.types import UserError

RAY_ENVIRONMENT = {
    "RAY_TRAIN_ENABLE_STATE_TRACKING": "1",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    # Many light processes on few cores are meant, and each imports for seconds: keep idle ones.
    "RAY_worker_maximum_startup_concurrency": "8",
    "RAY_idle_worker_killing_time_threshold_ms": "60000",
    "TOKENIZERS_PARALLELISM": "false",
}


def absolute_storage(recipe: Recipe) -> Recipe:
    """Workers do not share the driver's folder, so a relative storage path is made absolute.

    A submitted job runs in a temporary copy of the project: there, relative means under home.
    """
    uri = os.path.expanduser(recipe.storage)
    if not storage.is_local(uri) or os.path.isabs(uri) or "://" in uri:
        return replace(recipe, storage=uri)
    submitted = "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ
    root = Path.home() if submitted else Path.cwd()
    return replace(recipe, storage=str(root / uri))


def show_plan(recipe: Recipe, targets: Iterable[Step]) -> None:
    """Say what would run, what would be reused, why, and what it would cost."""
    planned = plan(targets)
    print(render_plan(planned), flush=True)
    if costs := estimate.of_plan(planned, recipe):
        print(estimate.render(costs), flush=True)


def _reckon(recipe: Recipe, planned: list[Planned]) -> None:
    """Refuse what its machines cannot hold; ask before spending more than `plan.limit`."""
    if not recipe.plan.cluster:
        return
    costs = estimate.of_plan(planned, recipe)
    if costs:
        print(estimate.render(costs), flush=True)
    for each in costs:
        if each.problem:
            told = "plan.cluster='' runs it all the same"
            raise UserError(f"{each.step.label}: {each.problem}\n{told}")
    hours = estimate.hours(costs)
    if not recipe.plan.limit or hours <= recipe.plan.limit:
        return
    problem = f"{hours:,.0f} accelerator hours are more than plan.limit, {recipe.plan.limit:g}"
    if not sys.stdin.isatty():
        raise UserError(f"{problem}; raise plan.limit, or answer on a terminal")
    if input(f"{problem}. Run it? [y/N] ").strip().lower() not in ("y", "yes"):
        raise UserError("not run")


Beside = Callable[[Any], contextlib.AbstractContextManager[None]]


def drive(recipe: Recipe, targets: Sequence[Step], beside: Beside | None = None) -> str:
    """Run what the targets need and storage does not hold yet; returns the run id.

    `beside` is entered with the run while it is at work.
    """
    planned = plan(targets)
    print(render_plan(planned), flush=True)
    _reckon(recipe, planned)
    storage.check_writable(recipe.storage)
    run_id = new_run_id()
    todo = [p.step for p in planned if not p.reused]
    if not todo:
        _describe(recipe, run_id, planned)
        return run_id
    started = time.monotonic()
    with Lease(recipe.storage, run_id, todo).taken() as lease:
        _describe(recipe, run_id, planned)
        with connected(recipe):
            _refuse_what_cannot_fit(recipe, todo)
            _execute(recipe, run_id, planned, lease, beside)
    print(f"ran {len(todo)} steps in {duration(time.monotonic() - started)}", flush=True)
    return run_id


def run_here(recipe: Recipe, targets: Sequence[Step]) -> None:
    """The same in a process that is on the cluster already; Busy when another one is at work."""
    run_id, todo = new_run_id(), [p.step for p in plan(targets) if not p.reused]
    if todo:
        storage.check_writable(recipe.storage)
        _refuse_what_cannot_fit(recipe, todo)
        with Lease(recipe.storage, run_id, todo).taken() as lease:
            planned = plan(targets)
            _describe(recipe, run_id, planned)
            _execute(recipe, run_id, planned, lease)


def new_run_id() -> str:
    return time.strftime("%Y%m%d-%H%M%S-") + uuid.uuid4().hex[:4]


def _describe(recipe: Recipe, run_id: str, planned: list[Planned]) -> None:
    """The resolved recipe and the plan are kept with the run."""
    described = {
        "run_id": run_id,
        "started": time.time(),
        "command": sys.argv,
        "host": platform.node(),
        "recipe": dump(recipe),
        "plan": [
            {
                **{"verb": p.step.verb, "name": p.step.name, "arm": p.step.arm},
                **{"fingerprint": p.step.fingerprint, "reused": p.reused, "reason": p.reason},
            }
            for p in planned
        ],
    }
    storage.write_json(storage.join(recipe.storage, "runs", run_id, "run.json"), described)


@contextlib.contextmanager
def connected(recipe: Recipe) -> Iterator[None]:
    """On the recipe's Ray cluster, or on one that is started on this machine for the time being."""
    os.environ.update({k: os.environ.get(k, v) for k, v in RAY_ENVIRONMENT.items()})
    import ray
    import ray.data

    _connect(recipe, ray)
    try:
        # `ray job stop` sends it. Only now: connecting puts Ray's own handlers in its place.
        signal.signal(signal.SIGTERM, _interrupt)
        _protect_token()
        ray.data.DataContext.get_current().enable_progress_bars = False
        url = ray.get_runtime_context().gcs_address
        total = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU")}
        print(f"ray {ray.__version__} at {url} with {total}", flush=True)
        yield
    finally:
        ray.shutdown()


def _connect(recipe: Recipe, ray: Any) -> None:
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    address = _address(recipe)
    if _is_local(recipe):
        # Nobody takes this machine away: one process less for each training.
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
        ray.init(
            address="local",
            num_cpus=recipe.cluster.num_cpus or None,
            object_store_memory=int(recipe.cluster.object_store_gib * 2**30),
            include_dashboard=True,
            **quiet,
        )
        return
    try:
        ray.init(address=address, **quiet)
    except ConnectionError as error:
        raise UserError(f"no Ray cluster answers at {address} (cluster.address)") from error


def _is_local(recipe: Recipe) -> bool:
    return _address(recipe) in ("", "local")


def _address(recipe: Recipe) -> str:
    return recipe.cluster.address or os.environ.get("RAY_ADDRESS", "")


def _refuse_what_cannot_fit(recipe: Recipe, todo: list[Step]) -> None:
    """A cluster of our own never grows: a step too large for it would wait for ever."""
    import ray

    from bar_ray.cluster.pool import demand_of
    from bar_ray.cluster.quota import missing

    nodes = [node["Resources"] for node in ray.nodes()]
    for step in todo if _is_local(recipe) else ():
        if lacking := missing(nodes, demand_of(step, "", recipe)):
            raise UserError(
                f"{step.label} asks for more than this machine has: {lacking}. Ask for less "
                "(run.num_workers, cpus_per_worker, gpus_per_worker), or give a larger cluster's "
                "address (cluster.address)"
            )


def own_token() -> None:
    """A token for clusters that this process starts itself; to be called before ray is imported."""
    os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _protect_token() -> None:
    """Ray writes its authentication token readable for everybody."""
    token = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    if token.is_file() and token.stat().st_uid == os.getuid():
        token.chmod(0o600)


def _execute(
    recipe: Recipe,
    run_id: str,
    planned: list[Planned],
    lease: Lease,
    beside: Beside | None = None,
) -> None:
    from bar_ray.cluster.run import Run, execute

    run = Run.start(recipe, run_id)
    try:
        with beside(run) if beside else contextlib.nullcontext():
            execute(planned, run, lease)
    finally:
        _close(run)


def _close(run: Any) -> None:
    """The last lines; a journal that cannot be written does not undo a finished run."""
    import ray

    try:
        for line in ray.get(run.journal.close.remote()):
            print(line, flush=True)
    except (ray.exceptions.RayError, UserError) as error:
        print(f"the run's journal is incomplete: {error}", file=sys.stderr, flush=True)


def _interrupt(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
