"""The board: a page to watch a run on while it is at work, and to look at it when it has ended.

It reads what runs write (run.json, events.jsonl, metrics.jsonl, transcripts.jsonl, pool.json), from
a disk or from object storage, and needs no cluster.
"""

import contextlib
from typing import Any


def beside(run: Any) -> contextlib.AbstractContextManager[None]:
    """The board while a run is at work, when its recipe asks for it."""
    from bar_ray.board import actor  # imports ray: a plan needs none

    return actor.beside(run)
