"""Notice of a change: a checkpoint before workers are taken away or added.

Clouds announce that they take a spot machine back 30 s (GCP) to 120 s (AWS) before. Ray Train
passes that on to every rank, as an answer to a question that all ranks must ask at the same steps:
so the number of steps between two questions is agreed on once, from the time that a step takes.
The pool is asked in the same rhythm whether the run should go on with another number of workers.
"""

import time
from collections.abc import Callable
from typing import Any

import ray.train

ASK_EVERY_S = 2.0
MARGIN_S = 5.0
MEASURED_STEPS = 4  # the first ones, after one to warm up


class Notice:
    """Whether a node of this run is about to be taken away, or the pool wants another size.

    Args:
        agree: gives every rank the first rank's result (`lm.from_first_rank`).
        report: called as `report(**fields)` on the first rank for each new notice.
        resize: asked on the first rank, with the seconds left; None for a run of a fixed size.
    """

    def __init__(
        self,
        agree: Callable[[Callable[[], Any]], Any],
        report: Callable[..., None],
        resize: Callable[[float], bool] | None = None,
    ) -> None:
        self.agree, self.report, self.resize = agree, report, resize
        self.every = 0  # steps between two questions, once known
        self.save_s = 0.0  # the longest checkpoint so far
        self._asked: list[float] = []
        self._nodes: set[str] = set()
        self._last_call = False

    def wants_checkpoint(self, step: int, left_s: float) -> bool:
        """Asked by every rank after every step: at a new notice, and once more shortly before the
        deadline; or before a change of size."""
        if not self.every:
            self._asked.append(time.monotonic())
            if len(self._asked) > MEASURED_STEPS:
                self.every = self.agree(self._steps_between)
            return False
        if step % self.every:
            return False
        info, resize = ray.train.get_preemption_info(), self.resize
        if info is not None:
            return self.agree(lambda: self._decide(info, step))
        return resize is not None and self.agree(lambda: resize(left_s))

    def saved(self, seconds: float) -> None:
        """A checkpoint took this long."""
        self.save_s = max(self.save_s, seconds)

    def _steps_between(self) -> int:
        step_s = (self._asked[-1] - self._asked[0]) / MEASURED_STEPS
        return max(1, round(ASK_EVERY_S / max(step_s, 1e-3)))

    def _decide(self, info: Any, step: int) -> bool:
        left = info.deadline_ms / 1000 - time.time() if info.deadline_ms else float("inf")
        new = set(info.preempted_node_ids) - self._nodes
        if new:
            self._nodes |= new
            self._last_call = False
            self.report(at=step, nodes=sorted(new), seconds_left=left)
            return True
        if not self._last_call and left < 2 * (self.save_s + ASK_EVERY_S) + MARGIN_S:
            self._last_call = True
            return True
        return False
