"""A training step as a Ray Train run. Torch is imported only where it is needed: in the workers."""

import contextlib
import gc
import importlib
import itertools
import signal
from collections.abc import Iterator
from typing import Any

from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig

from bar_ray import lean, storage
from bar_ray.cluster.pool import bundle_of_worker, holder
from bar_ray.cluster.process_group import ProcessGroup
from bar_ray.cluster.scaling import PoolTrainer
from bar_ray.graph import Step
from bar_ray.recipe import Run as RunSettings
from bar_ray.types import UserError, user_error_in


def language_model(steps: list[Step], run: Any) -> None:
    """Inputs: `model` and one `data:NAME` token artifact per source; settings: stage, seed."""
    train("bar_ray.stages.lm:LmWorker", steps, run)


def router(steps: list[Step], run: Any) -> None:
    """The same, of the merged model's router; settings also `top_k`."""
    train("bar_ray.route:RouteWorker", steps, run)


def lora(steps: list[Step], run: Any) -> None:
    """The same through adapters on a dense model; settings also `lora`."""
    train("bar_ray.baselines.lora:LoraWorker", steps, run)


def fisher(steps: list[Step], run: Any) -> None:
    """Inputs and settings as of a language model; nothing is trained."""
    train("bar_ray.stages.fisher:FisherWorker", steps, run)


def train(worker: str, steps: list[Step], run: Any, **extra: Any) -> None:
    """Run steps under Ray Train, one after the other, until each has committed its artifact.

    Args:
        worker: what each rank is, as `module:class`, a `stages.lm.Worker`.
        steps: of equal `run` settings; their workers are started once.
        extra: more arguments of that class.
    """
    if not steps:
        return
    settings: RunSettings = steps[0].settings["stage"].run
    config = {"worker": worker, "steps": steps, "run": run, **extra}
    for num_lost in itertools.count(1):
        try:
            with _handlers_kept():
                result = _trainer(steps[0], run, config).fit()
            break
        except RayActorError as error:  # Ray Train restarts workers, but not its own controller
            if num_lost > settings.max_failures:
                raise
            run.event("controller_lost", steps[0], reason=str(error).splitlines()[0])
    if isinstance(result.return_value, dict) and "user_error" in result.return_value:
        raise UserError(result.return_value["user_error"])


@contextlib.contextmanager
def _handlers_kept() -> Iterator[None]:
    """Ray Train's handler for interrupts holds the controller, which would live as long as it."""
    before = signal.getsignal(signal.SIGINT)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _trainer(step: Step, run: Any, config: dict[str, Any]) -> PoolTrainer:
    settings: RunSettings = step.settings["stage"].run
    uri = storage.join(step.storage_uri, "checkpoints", "ray_train")
    filesystem, path = storage.resolve(uri)
    return PoolTrainer(
        _work,
        holder(run.run_id, step),
        train_loop_config=config,
        backend_config=ProcessGroup(),
        scaling_config=ScalingConfig(
            num_workers=(settings.fewest_workers, settings.num_workers),
            use_gpu=settings.gpus_per_worker > 0,
            resources_per_worker=bundle_of_worker(settings),
        ),
        run_config=RunConfig(
            name=f"{step.verb}-{step.name}-{step.fingerprint}-{run.run_id}",
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(
                max_failures=settings.max_failures,
                max_preemption_failures=settings.max_preemptions,
            ),
        ),
    )


def _work(config: dict[str, Any]) -> dict[str, Any]:
    """One rank. A user's mistake is returned, not raised: retrying cannot mend it."""
    module, name = config.pop("worker").split(":")
    made: dict[str, Any] = {}
    try:
        with lean.imports():  # to the end: engines and models import when they are first made
            rank_of = getattr(importlib.import_module(module), name)
            for step in config.pop("steps"):
                if storage.read_manifest(step.artifact.uri) is None:  # else before a loss
                    made = _one(rank_of(step=step, **config))
                    gc.collect()  # engines hold themselves; the next step needs their memory
    except Exception as error:
        if mistake := user_error_in(error):
            return {"user_error": str(mistake)}
        raise
    return made


def _one(rank: Any) -> dict[str, Any]:
    with contextlib.closing(rank.ledger):
        return rank.loop()
