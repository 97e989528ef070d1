"""The pool as an actor of a Ray cluster: how drivers and workers reach it, what it tells Ray."""

import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray._private.state import state as cluster_state
from ray.exceptions import GetTimeoutError, RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bar_ray.cluster.pool import Pool
from bar_ray.cluster.quota import Resources

NAME, NAMESPACE = "pool", "bar_ray"
LOOK_EVERY_S = 1.0
REQUEST_EVERY_S, REQUEST_EXPIRES_S = 20.0, 120.0
ANSWER_S = 10.0


class PoolActor(Pool):
    """The pool of this cluster. It ends with the driver that made it; others make a new one."""

    def __init__(self) -> None:
        super().__init__(Nodes(), Autoscaler().request)


class Nodes:
    """The nodes that can be used: alive, and not about to be taken away."""

    def __init__(self) -> None:
        self.seen, self.looked = [], float("-inf")

    def __call__(self) -> Sequence[Resources]:
        if time.monotonic() - self.looked > LOOK_EVERY_S:
            self.looked = time.monotonic()
            leaving = cluster_state.get_draining_nodes()
            alive = [n for n in ray.nodes() if n["Alive"] and n["NodeID"] not in leaving]
            self.seen = [dict(node["Resources"]) for node in alive]
        return self.seen


class Autoscaler:
    """Requests to Ray's autoscaler through the coordinator that Ray Train and Ray Data use.

    The autoscaler has one slot for such requests, and the coordinator writes it every 20 s.
    """

    def __init__(self) -> None:
        self.name = f"bar_ray-pool-{os.getpid()}"
        self.asked: Any = None
        self.at = float("-inf")

    def request(self, held: list[Resources], beyond: list[Resources]) -> None:
        """Ask for what is held to stay and, behind everybody's claims, for more."""
        if self.asked == (held, beyond) and time.monotonic() - self.at < REQUEST_EVERY_S:
            return
        from ray.data._internal.cluster_autoscaler.default_autoscaling_coordinator import (
            ResourceRequestPriority,
            get_or_create_autoscaling_coordinator,
        )

        self.asked, self.at = (held, beyond), time.monotonic()
        coordinator = get_or_create_autoscaling_coordinator()
        kinds = {"held": ResourceRequestPriority.HIGH, "more": ResourceRequestPriority.LOW}
        for (kind, priority), bundles in zip(kinds.items(), (held, beyond), strict=True):
            coordinator.request_resources.remote(
                requester_id=f"{self.name}-{kind}",
                resources=bundles,
                expire_after_s=REQUEST_EXPIRES_S,
                priority=priority,
            )


class PoolClient:
    """The cluster's pool, from any process of a run. Its methods are those of `Pool`.

    Args:
        create: make the pool when there is none; only drivers do.
    """

    def __init__(self, create: bool = False) -> None:
        self.create = create
        self.actor: Any = None

    def ask(self, method: str, *arguments: Any, default: Any = None) -> Any:
        """The pool's answer, or `default` when there is no pool for the moment."""
        if self.actor is None:
            self.actor = self._find()
        if self.actor is None:
            return default
        try:
            return ray.get(getattr(self.actor, method).remote(*arguments), timeout=ANSWER_S)
        except (RayActorError, GetTimeoutError):
            self.actor = None
            return default

    def _find(self) -> Any:
        if not self.create:
            try:
                return ray.get_actor(NAME, NAMESPACE)
            except ValueError:  # there is none
                return None
        here = ray.get_runtime_context().get_node_id()
        return (
            ray.remote(PoolActor)
            .options(
                **{"name": NAME, "namespace": NAMESPACE, "get_if_exists": True, "num_cpus": 0},
                scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False),
            )
            .remote()
        )
