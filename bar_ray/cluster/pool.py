"""The pool all steps share: a step's resources are leased whole, before anything of it is started.

A stage that needs several groups of processes (engines and learners) would otherwise hold one
group while waiting for another, and two such stages would wait for each other for ever. Leases are
granted by priority, then in the order of asking; one that never fits what the cluster has is
granted when nothing else runs, so that its placement groups can make an autoscaling cluster grow.
"""

import math
from collections.abc import Callable

from bar_ray.graph import Step
from bar_ray.recipe import Evaluate, Rlvr, Stage

Resources = dict[str, float]
LIGHT: Resources = {"CPU": 1.0}  # steps that read, write and copy


class Pool:
    """Leases by holder, owned by the driver. `total` says what the cluster has now."""

    def __init__(self, total: Callable[[], Resources]) -> None:
        self.total = total
        self.leases: dict[str, Resources] = {}

    def try_lease(self, holder: str, resources: Resources) -> bool:
        """Take the resources if they fit beside what is leased."""
        if self.leases and not self._fits(resources):
            return False
        self.leases[holder] = resources
        return True

    def release(self, holder: str) -> None:
        del self.leases[holder]

    def missing(self, resources: Resources) -> str:
        """What the whole cluster lacks for them, in words; empty when it has enough."""
        total = self.total()
        short = {k: v for k, v in resources.items() if v > total.get(k, 0.0) + 1e-6}
        return ", ".join(f"{v:g} {k} of {total.get(k, 0.0):g}" for k, v in short.items())

    def _fits(self, resources: Resources) -> bool:
        total = self.total()
        return all(
            math.fsum([amount, *(lease.get(name, 0.0) for lease in self.leases.values())])
            <= total.get(name, 0.0) + 1e-6
            for name, amount in resources.items()
        )


def needs(step: Step) -> Resources:
    """What a step takes from the pool, all its processes together."""
    settings = step.settings
    if isinstance(settings, Evaluate):
        return _times(settings.num_engines, settings.cpus_per_engine, settings.gpus_per_engine)
    stage = settings.get("stage") if isinstance(settings, dict) else None
    if not isinstance(stage, Stage):
        return LIGHT
    run = stage.run
    needed = _times(run.num_workers, run.cpus_per_worker, run.gpus_per_worker)
    if isinstance(stage, Rlvr):
        rollout = stage.rollout
        engines = _times(rollout.num_engines, rollout.cpus_per_engine, rollout.gpus_per_engine)
        needed = {k: needed.get(k, 0.0) + engines.get(k, 0.0) for k in {*needed, *engines}}
    return needed


def _times(count: int, cpus: float, gpus: float) -> Resources:
    return {k: v for k, v in (("CPU", count * cpus), ("GPU", count * gpus)) if v}
