"""Remote calls with a deadline: what is late is named, with whom, and since when."""

import asyncio
import time
from typing import Any

import ray
from ray.exceptions import RayActorError

from bar_ray.rollout.engine import EngineLost


class Late(RuntimeError):
    """A call was not answered in time."""


class Restarted(RuntimeError):
    """The actor was started again and knows nothing: Ray keeps calls made meanwhile for it."""


LOST = (RayActorError, EngineLost, Late)  # the actor is gone, unfit, or silent: replace it


async def answer(ref: Any, seconds: float, who: str) -> Any:
    """The result of a remote call, or `Late`; cancelling this cancels the call too."""
    since = time.strftime("%H:%M:%S")
    future = asyncio.wrap_future(ref.future())
    try:
        return await asyncio.wait_for(future, seconds)
    except TimeoutError:
        raise Late(f"{who} has not answered since {since} ({seconds:g} s)") from None
    except asyncio.CancelledError:
        ray.cancel(ref)
        raise


def ask(ref: Any, seconds: float, who: str) -> Any:
    """`answer` for callers without an event loop."""
    since = time.strftime("%H:%M:%S")
    try:
        return ray.get(ref, timeout=seconds)
    except ray.exceptions.GetTimeoutError:
        raise Late(f"{who} has not answered since {since} ({seconds:g} s)") from None
