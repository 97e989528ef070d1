"""What each worker of a language-model stage does (`midtrain`, `sft`, dense `train`, `route`).

The sample order is a function of (seed, step), so a checkpoint is weights, optimizer and a step
number; continuing at the same number of workers is bitwise the same as never having stopped.
"""

import contextlib
import ctypes
import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

import ray.train
import torch

from bar_ray import storage
from bar_ray.cluster.pool import holder
from bar_ray.cluster.sharing import PoolClient
from bar_ray.cost import Shape, peak_flops
from bar_ray.graph import Step, inputs_of
from bar_ray.recipe import Stage
from bar_ray.types import UserError, user_error_in
from kernels import device

Result = TypeVar("Result")
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
IDLE_RATE = 0.2  # of the running mean over steps


def on_every_rank(work: Callable[[], Result]) -> Result:
    """Do the work on every rank; a user's mistake of one rank is raised on all of them.

    Otherwise the others would wait for it in their next collective.
    """
    mistake, result = "", None
    try:
        result = work()
    except Exception as error:
        found = user_error_in(error)
        if found is None:
            raise
        mistake = str(found)
    mistakes = [""] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(mistakes, mistake)
    if first := next(filter(None, mistakes), ""):
        raise UserError(first)
    return cast(Result, result)


def from_first_rank(work: Callable[[], Result]) -> Result:
    """Do the work on rank 0 and give every rank its result, or its user's mistake."""
    boxed = [on_every_rank(lambda: work() if torch.distributed.get_rank() == 0 else None)]
    torch.distributed.broadcast_object_list(boxed, src=0)
    return cast(Result, boxed[0])


class Worker:
    """One rank of a training stage: model, engine, checkpoints, step lines.

    Subclasses say how many steps there are (`prepare`) and what one step does (`train_step`).
    """

    def __init__(self, step: Step, run: Any) -> None:
        from bar_ray.train.ledger import Ledger
        from bar_ray.train.notice import Notice

        self.step, self.run = step, run
        self.stage: Stage = step.settings["stage"]
        context = ray.train.get_context()
        self.rank, self.world = context.get_world_rank(), context.get_world_size()
        prepare_process(self.stage.run.threads)
        self.ledger = Ledger(step, self.stage.run.keep_last)
        self.pool, self.holder = PoolClient(), holder(run.run_id, step)
        self.resizing = False
        self.idle = 0.0  # share of the time that goes by waiting for rollouts
        settings = self.stage.run
        is_elastic = settings.fewest_workers < settings.num_workers
        self.notice = Notice(
            from_first_rank,
            lambda **fields: run.event("preemption", step, **fields),
            self._wants_resize if is_elastic else None,
        )

    def loop(self) -> dict[str, Any]:
        from bar_ray.train.engine import Engine

        self.model_folder = on_every_rank(lambda: self.run.fetch(self.step.inputs["model"]))
        self.num_steps = on_every_rank(self.prepare)
        self.engine = Engine(self.load_model(), self.stage, self.num_steps)
        self._warn()
        self._set_flops()
        self.before_resume()
        self.start(self._resume())
        started, first = time.monotonic(), self.engine.step
        while self.engine.step < self.num_steps:
            now = time.monotonic()
            metrics = self.train_step()
            if metrics is None:
                break
            self._require_finite(metrics)
            seconds = time.monotonic() - now
            pace = (time.monotonic() - started) / (self.engine.step - first)
            left_s = (self.num_steps - self.engine.step) * pace
            self.idle += IDLE_RATE * (metrics.get("rollout_wait_s", 0.0) / seconds - self.idle)
            self._log(metrics, seconds, left_s)
            noticed = self.notice.wants_checkpoint(self.engine.step, left_s)
            if noticed or self.must_checkpoint():
                self._checkpoint(is_awaited=noticed)
        from_first_rank(self.ledger.wait)
        self.before_output()
        self._finish(time.monotonic() - started)
        return {"steps": self.engine.step}

    def _warn(self) -> None:
        is_slow = self.engine.device.type == "cpu" and not device.multiplies_bfloat16()
        if is_slow and self.stage.dtype == "bfloat16" and self.rank == 0:
            told = "this CPU has no bfloat16: steps take ten times as long as with dtype: float32"
            self.run.say(self.step, told)

    def prepare(self) -> int:
        """Make the data ready; returns the number of optimizer steps."""
        raise NotImplementedError

    def train_step(self) -> dict[str, float] | None:
        """One optimizer step; its numbers with `tokens` among them, None when data has run out."""
        raise NotImplementedError

    def load_model(self) -> Any:
        """The model of the step, ready for training."""
        from bar_ray.model import fused

        dtype, top_k = getattr(torch, self.stage.dtype), self.step.settings.get("top_k", 0)
        return fused.load(self.model_folder, dtype, top_k, self.stage.run.kernels)

    def on_disk(self, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """What is written of the trained weights, for models that are changed for training."""
        return weights

    def before_resume(self) -> None:
        """Called when the model is as the stage was given it."""

    def must_checkpoint(self) -> bool:
        return self.engine.step % self.stage.run.checkpoint_every == 0

    @property
    def best_step(self) -> int:
        """The step whose checkpoint must not be dropped; 0 for none."""
        return 0

    def before_output(self) -> None:
        """Called when training has ended, before the model is written."""

    def start(self, state: dict[str, Any]) -> None:
        """Called with the state of the checkpoint that is continued, {} at the beginning."""

    def checkpoint_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside weights and optimizer."""
        return {}

    def finish_output(self, folder: str) -> None:
        """For stages that add files to their artifact."""

    def _require_finite(self, metrics: dict[str, float]) -> None:
        """Stop a run that has diverged: nothing it would commit is worth keeping."""
        for name in ("loss", "grad_norm"):  # the same on every rank
            if not math.isfinite(metrics.get(name, 0.0)):
                raise UserError(
                    f"{self.step.label}: {name} is {metrics[name]} at step {self.engine.step}. "
                    "Lower the learning rate (lr, learn) or raise warmup; the last checkpoint is "
                    "from before"
                )

    def _resume(self) -> dict[str, Any]:
        at, warnings = from_first_rank(self.ledger.newest)
        for warning in warnings if self.rank == 0 else ():
            self.run.say(self.step, warning)
            self.run.event("checkpoint_damaged", self.step, reason=warning)
        if not at:
            return {}
        state = self.engine.load(on_every_rank(lambda: self.ledger.folder(at)))
        if self.rank == 0:
            self.run.say(self.step, f"continues at step {self.engine.step}/{self.num_steps}")
            self.run.event("resumed", self.step, at=self.engine.step)
        return state

    def _checkpoint(self, is_awaited: bool) -> None:
        """Save; the upload goes on beside the next steps, unless a change waits for it."""
        started, step = time.monotonic(), self.engine.step
        from_first_rank(self.ledger.wait)  # for the checkpoint before
        folder = from_first_rank(lambda: storage.scratch(self.ledger.staging))
        on_every_rank(lambda: self._save(folder))
        if self.rank == 0:
            there = functools.partial(self.run.event, "checkpoint", self.step, at=step)
            self.ledger.begin_commit(folder, step, self.best_step, there)
        saved_s = time.monotonic() - started
        if is_awaited:
            from_first_rank(self.ledger.wait)
        ray.train.report({"step": step})
        self.notice.saved(saved_s + self.ledger.commit_s)
        if self.resizing:
            self.pool.ask("saved", self.holder, "workers")

    def _save(self, folder: str) -> None:
        try:
            with storage.unless_full("save a checkpoint in", folder):
                self.engine.save(folder, self.checkpoint_state())
        except (OSError, UserError):
            storage.discard(folder)  # a full disk needs the room
            raise

    def _wants_resize(self, left_s: float) -> bool:
        """Whether the pool has more or fewer workers for this run; it waits for a checkpoint."""
        asked = ("wants_change", self.holder, "workers", left_s, self.idle)
        self.resizing = self.pool.ask(*asked, default=False)
        return self.resizing

    def _set_flops(self) -> None:
        """FLOPs of training on a token, and what all workers could do in a second, if known."""
        shape = Shape.of(self.engine.model.config.to_dict())
        self.flops = shape.flops(self.stage.learn, self.stage.seq_len).total
        name = torch.cuda.get_device_name() if self.engine.device.type == "cuda" else ""
        self.peak_flops = peak_flops(name) * self.world

    def _log(self, metrics: dict[str, float], seconds: float, left: float) -> None:
        if self.rank:
            return
        step = self.step
        speed = metrics["tokens"] / seconds * self.flops
        self.run.journal.metrics.remote(
            {
                **{"verb": step.verb, "name": step.name, "fingerprint": step.fingerprint},
                **({"arm": step.arm} if step.arm else {}),
                **{"step": self.engine.step, "steps": self.num_steps, "eta_s": left},
                **{k: v for k, v in metrics.items() if k != "tokens"},
                "tokens_per_s": metrics["tokens"] / seconds,
                "tflops": speed / 1e12,
                **({"mfu": speed / self.peak_flops} if self.peak_flops else {}),
                "seconds": seconds,
            }
        )

    def _finish(self, seconds: float) -> None:
        from bar_ray.model import experts

        weights = self.engine.weights()
        if self.rank:
            return
        tokens = self.num_steps * self.stage.batch_size * self.stage.seq_len
        info = {"steps": self.num_steps, "tokens": tokens}
        with self.run.output(self.step, info) as folder:
            stored = self.on_disk(weights)
            experts.write(self.engine.model.config, stored, folder, self.model_folder)
            self.finish_output(folder)
        self.run.event("trained", self.step, seconds=seconds, **info)
        self.ledger.clear()


class LmWorker(Worker):
    """A rank that learns from packed token rows."""

    def prepare(self) -> int:
        from bar_ray.data.batches import Batches

        sources = inputs_of(self.step, "data")
        folders = [self.run.fetch(tokens) for tokens in sources.values()]
        shares = [self.step.settings["shares"][name] for name in sources]
        self.batches = Batches(folders, shares, self.stage, self.step.settings["seed"])
        return self.batches.num_steps

    def train_step(self) -> dict[str, float]:
        """One optimizer step on the global batch of this step."""
        from bar_ray.train.loss import language_model_loss

        batch = self.batches(self.engine.step, self.rank, self.world)
        model, weight = self.engine.model, self.stage.router_z_loss

        def loss(micro: Any) -> tuple[torch.Tensor, dict[str, float]]:
            return language_model_loss(
                model, micro.to(self.engine.device), batch.loss_tokens, batch.tokens, weight
            )

        metrics = self.engine.forward_backward(batch.micro, loss)
        return {**metrics, **self.engine.optim_step(), "tokens": batch.tokens}


def prepare_process(threads: int) -> None:
    """Threads of this worker, its memory on a CPU, quiet libraries."""
    torch.set_num_threads(max(1, threads))
    if not torch.cuda.is_available():
        _keep_freed_memory()
    for name in ("DeepSpeed", "transformers"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _keep_freed_memory() -> None:
    """glibc hands every large tensor back to the system and asks for it again, page by page.

    Keeping it was 4 % of a small model's step, at the same peak.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_THRESHOLD, 2**30)
