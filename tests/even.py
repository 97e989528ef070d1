"""A reward that an untrained model gets half of the time, so that short runs have a signal."""

from typing import Any

from bar_ray.types import Verdict


def grade(completion: str, ground_truth: Any) -> Verdict:
    """Right when the sum of the characters is even."""
    is_even = sum(map(ord, completion)) % 2 == 0
    return Verdict(float(is_even), "right" if is_even else "wrong")
