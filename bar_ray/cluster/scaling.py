"""How the training runs of Ray Train follow the pool.

Ray Train's own elastic runs each ask for their largest size, first come first served, and do not
see placement groups beside them, so a second run gets nothing; hence a scaling policy of our own,
an internal interface of Ray Train: `tests/test_pool.py` fails when a new Ray changes it.
"""

from collections.abc import Callable
from typing import Any

from ray.train.v2._internal.callbacks import DatasetsCallback
from ray.train.v2._internal.execution.scaling_policy import (
    NoopDecision,
    ResizeDecision,
    ScalingDecision,
    ScalingPolicy,
)
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from bar_ray.cluster.sharing import PoolClient


class FollowPool(ScalingPolicy):
    """A Ray Train run has as many workers as the pool says."""

    def __init__(self, scaling_config: Any, holder: str) -> None:
        super().__init__(scaling_config)
        self.holder, self.pool, self.count = holder, PoolClient(), scaling_config.min_workers

    def make_decision_for_non_running_worker_group(self) -> ScalingDecision:
        """At the start and after a fault."""
        return self._resize(self.pool.ask("take", self.holder, "workers") or self.count)

    def make_decision_for_running_worker_group(
        self, worker_group_state: Any, worker_group_status: Any
    ) -> ScalingDecision:
        """Every health check."""
        running = worker_group_state.num_workers
        count = self.pool.ask("follow", self.holder, "workers", running, default=running)
        if count != running:
            return self._resize(count)
        self._maybe_send_resource_request()
        return NoopDecision()

    def _resize(self, count: int) -> ResizeDecision:
        self.count = count
        self._send_resource_request()
        return ResizeDecision(count, self.scaling_config._resources_per_worker_not_none)

    def _get_num_workers_for_resource_request(self) -> int:
        return self.count


class PoolTrainer(DataParallelTrainer):
    """A trainer of Ray Train that shares the pool.

    Args:
        holder: the name of the step in the pool.
    """

    def __init__(self, loop: Callable[..., Any], holder: str, **arguments: Any) -> None:
        super().__init__(loop, **arguments)
        self.holder = holder

    def _create_default_callbacks(self) -> list[Any]:
        """Without the actor that splits datasets: ours are artifacts, which workers read alone."""
        found = super()._create_default_callbacks()
        return [callback for callback in found if not isinstance(callback, DatasetsCallback)]

    def _initialize_and_run_controller(self, **controller: Any) -> Any:
        policy = FollowPool(self.scaling_config, self.holder)
        return super()._initialize_and_run_controller(**{**controller, "scaling_policy": policy})
