"""Where else a run's numbers go: TensorBoard, Weights & Biases, MLflow.

A tracker is told the numbers of one optimizer step at a time. One that fails is left out from then
on: it must not cost the run.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import Protocol

from bar_ray.recipe import Tracking

Numbers = Mapping[str, float]


class Tracker(Protocol):
    def log(self, who: str, step: int, numbers: Numbers) -> None:
        """`who` is `STAGE/EXPERT`."""

    def close(self) -> None:
        """Everything is written."""


class TensorBoard:
    """Event files in the run's folder."""

    def __init__(self, folder: str) -> None:
        self.folder, self.writers = folder, {}

    def log(self, who: str, step: int, numbers: Numbers) -> None:
        if who not in self.writers:
            from tensorboardX import SummaryWriter  # imports torch: seconds

            self.writers[who] = SummaryWriter(os.path.join(self.folder, who), flush_secs=10)
        for name, value in numbers.items():
            self.writers[who].add_scalar(name, value, step)

    def close(self) -> None:
        for writer in self.writers.values():
            writer.close()


class Wandb:
    """A W&B run per stage, grouped by ours; the key comes from the environment."""

    def __init__(self, settings: Tracking, run_id: str, folder: str) -> None:
        import wandb

        self.wandb, self.settings = wandb, settings
        self.run_id, self.folder, self.runs = run_id, folder, {}

    def log(self, who: str, step: int, numbers: Numbers) -> None:
        if who not in self.runs:
            os.makedirs(self.folder, exist_ok=True)
            self.runs[who] = self.wandb.init(
                project=self.settings.project,
                name=f"{who} {self.run_id}",
                group=self.run_id,
                job_type=who.partition("/")[0],
                dir=self.folder,
                reinit="create_new",  # several at once in one process
                settings=self.wandb.Settings(console="off", disable_git=True, disable_code=True),
            )
            # Steps of a stage that was resumed go back; W&B's own count may not.
            self.runs[who].define_metric("*", step_metric="optimizer_step")
        self.runs[who].log({**numbers, "optimizer_step": step})

    def close(self) -> None:
        for run in self.runs.values():
            run.finish()


class MlFlow:
    """An MLflow run per stage; the server is `tracking.mlflow_uri` or $MLFLOW_TRACKING_URI."""

    def __init__(self, settings: Tracking, run_id: str) -> None:
        from mlflow.entities import Metric
        from mlflow.tracking import MlflowClient

        self.metric, self.run_id, self.runs = Metric, run_id, {}
        self.client = MlflowClient(tracking_uri=settings.mlflow_uri or None)
        known = self.client.get_experiment_by_name(settings.project)
        self.experiment = (
            known.experiment_id if known else self.client.create_experiment(settings.project)
        )

    def log(self, who: str, step: int, numbers: Numbers) -> None:
        if who not in self.runs:
            tags = {"bar_ray_run": self.run_id, "stage": who.partition("/")[0]}
            name = f"{who} {self.run_id}"
            run = self.client.create_run(self.experiment, run_name=name, tags=tags)
            self.runs[who] = run.info.run_id
        now = int(1e3 * time.time())
        metrics = [self.metric(name, value, now, step) for name, value in numbers.items()]
        self.client.log_batch(self.runs[who], metrics=metrics)

    def close(self) -> None:
        for run in self.runs.values():
            self.client.set_terminated(run)


def made(settings: Tracking, run_id: str, folder: str) -> dict[str, Tracker]:
    """The trackers of a recipe, by name."""
    kinds: dict[str, Callable[[], Tracker]] = {
        "tensorboard": lambda: TensorBoard(os.path.join(folder, "tensorboard")),
        "wandb": lambda: Wandb(settings, run_id, folder),
        "mlflow": lambda: MlFlow(settings, run_id),
    }
    return {name: kinds[name]() for name in settings.trackers}
