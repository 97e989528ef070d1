"""A run's numbers for Prometheus, through Ray's metrics agent.

Ray clears a gauge when it has exported it (every 10 s) and drops what is not set again for 20 s, so
the gauges of stages at work are set again every few seconds, however long their steps take. What
ended disappears by itself. Ray's agent keeps at most 2,000 label sets of a metric for as long as it
lives: labels name runs, experts and stages, never steps or errors.
"""

import math
import threading
from collections.abc import Mapping
from typing import Any

from ray.util.metrics import Counter, Gauge

BEAT_S = 5.0
PREFIX = "bar_ray_"
LABELS = ("run", "expert", "stage")
# What the record of a step calls it -> the metric, by Prometheus' conventions, with a factor.
GAUGES: dict[str, tuple[str, float, str]] = {
    "step": ("step", 1, "optimizer steps made"),
    "steps": ("steps", 1, "optimizer steps of the stage"),
    "eta_s": ("eta_seconds", 1, "time until the stage ends"),
    "loss": ("loss_nats", 1, "training loss"),
    "reward": ("reward_ratio", 1, "mean reward of the rollouts"),
    "kl": ("kl_nats", 1, "KL divergence from the model the stage began with"),
    "entropy": ("entropy_nats", 1, "entropy of the policy per token"),
    "gap": ("engine_gap_nats", 1, "difference of log-probabilities, learner and engine"),
    "grad_norm": ("gradient_norm", 1, "norm of the gradient before clipping"),
    "tokens_per_s": ("tokens_per_second", 1, "tokens learned from per second"),
    "mfu": ("mfu_ratio", 1, "counted FLOP/s over the device's peak"),
    "staleness": ("staleness_steps", 1, "age of the rollouts' weights"),
    "truncated": ("truncated_ratio", 1, "completions cut at max_tokens"),
    "zero_variance": ("zero_variance_ratio", 1, "groups whose completions got one reward"),
    "engines_idle": ("engines_idle_ratio", 1, "time that engines had nothing to do"),
    "rollout_wait_s": ("rollout_wait_seconds", 1, "time the learner waited for rollouts"),
    "sync_s": ("weight_push_seconds", 1, "time of one weight push"),
    "sync_mb": ("weight_push_bytes", 1e6, "bytes of one weight push"),
}

Who = tuple[str, str]  # expert, stage


class Exporter:
    """Gauges of the stages at work and of the pool, set again and again; counters of events."""

    def __init__(self, run_id: str, beat_s: float = BEAT_S) -> None:
        self.run_id, self.beat_s = run_id, beat_s
        self.live: dict[Who, dict[str, float]] = {}
        self.resources: dict[tuple[str, str], float] = {}
        self.gauges: dict[str, Gauge] = {}
        self.lock = threading.Lock()
        self.ended = threading.Event()
        run = ("run",)
        self.steps = Counter(f"{PREFIX}optimizer_steps_total", "optimizer steps", tag_keys=LABELS)
        self.tokens = Counter(f"{PREFIX}tokens_total", "tokens learned from", tag_keys=LABELS)
        self.events = Counter(f"{PREFIX}events_total", "what happened", tag_keys=(*run, "event"))
        self.pool = Gauge(
            f"{PREFIX}pool_resources",
            "resources of the cluster by state",
            tag_keys=(*run, "resource", "state"),
        )
        threading.Thread(target=self._beat, daemon=True).start()

    def record(self, who: Who, record: Mapping[str, Any]) -> None:
        """The numbers of one optimizer step."""
        numbers = {
            GAUGES[name][0]: GAUGES[name][1] * value
            for name, value in record.items()
            if name in GAUGES and isinstance(value, int | float) and math.isfinite(value)
        }
        with self.lock:
            self.live[who] = numbers
        labels = self._labels(who)
        self.steps.inc(1, tags=labels)
        if tokens := record.get("tokens_per_s", 0.0) * record.get("seconds", 0.0):
            self.tokens.inc(tokens, tags=labels)
        self._set(who, numbers)

    def event(self, event: str) -> None:
        self.events.inc(1, tags={"run": self.run_id, "event": event})

    def end(self, who: Who) -> None:
        """The stage is at work no longer."""
        with self.lock:
            self.live.pop(who, None)

    def view(self, view: Mapping[str, Any]) -> None:
        """The pool as its actor describes it."""
        total, free = view.get("total", {}), view.get("free", {})
        with self.lock:
            self.resources = {
                (kind, state): amount
                for kind in total
                for state, amount in (
                    ("held", total[kind] - free.get(kind, 0.0)),
                    ("free", free.get(kind, 0.0)),
                )
            }
        self._set_pool()

    def close(self) -> None:
        self.ended.set()

    def _beat(self) -> None:
        while not self.ended.wait(self.beat_s):
            with self.lock:
                live = list(self.live.items())
            for who, numbers in live:
                self._set(who, numbers)
            self._set_pool()

    def _set(self, who: Who, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._gauge(name).set(value, tags=self._labels(who))

    def _set_pool(self) -> None:
        with self.lock:
            resources = list(self.resources.items())
        for (kind, state), amount in resources:
            self.pool.set(amount, tags={"run": self.run_id, "resource": kind, "state": state})

    def _labels(self, who: Who) -> dict[str, str]:
        return {"run": self.run_id, "expert": who[0], "stage": who[1]}

    def _gauge(self, name: str) -> Gauge:
        if name not in self.gauges:
            meaning = next(text for metric, _, text in GAUGES.values() if metric == name)
            self.gauges[name] = Gauge(f"{PREFIX}{name}", meaning, tag_keys=LABELS)
        return self.gauges[name]
