"""Placement groups that are waited for aloud and always removed."""

import contextlib
import time
from collections.abc import Callable, Iterator

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

SAY_EVERY_S = 30.0


@contextlib.contextmanager
def placement_groups(
    bundles: list[dict[str, float]], name: str, say: Callable[[str], None]
) -> Iterator[list[PlacementGroup]]:
    """One group of one bundle for each entry, so that each can be lost and replaced alone.

    A group outlives the process that made it until the job ends, so it is removed here on every
    way out.
    """
    groups = [placement_group([b], name=f"{name}-{i}") for i, b in enumerate(bundles)]
    try:
        _wait(groups, bundles, name, say)
        yield groups
    finally:
        for group in groups:
            remove_placement_group(group)


def _wait(
    groups: list[PlacementGroup], bundles: list[dict[str, float]], name: str, say: Callable
) -> None:
    started = time.monotonic()
    waiting = [group.ready() for group in groups]
    while waiting:
        _, waiting = ray.wait(waiting, num_returns=len(waiting), timeout=SAY_EVERY_S)
        if waiting:
            seconds = round(time.monotonic() - started)
            free = {k: v for k, v in ray.available_resources().items() if k in ("CPU", "GPU")}
            say(f"{name} waits {seconds}s for {len(waiting)} x {bundles[0]}; free now: {free}")
