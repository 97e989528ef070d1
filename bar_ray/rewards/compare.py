"""Equality of plain JSON values, decided where model-written code cannot reach."""

import json
import math
from typing import Any

from bar_ray.types import UserError


def same(expected: Any, actual: Any, rel_tol: float = 0.0, abs_tol: float = 0.0) -> bool:
    """Equal in value and JSON type: 2 is 2.0, True is not 1, tuples are lists, NaN is NaN.

    Tolerance applies as soon as one of two numbers is a float.
    """
    if isinstance(expected, bool) or isinstance(actual, bool):
        return expected is actual
    if isinstance(expected, int | float) and isinstance(actual, int | float):
        return _same_number(expected, actual, rel_tol, abs_tol)
    if isinstance(expected, list | tuple) and isinstance(actual, list | tuple):
        return len(expected) == len(actual) and all(
            same(e, a, rel_tol, abs_tol) for e, a in zip(expected, actual, strict=True)
        )
    if isinstance(expected, dict) and isinstance(actual, dict):
        return expected.keys() == actual.keys() and all(
            same(value, actual[key], rel_tol, abs_tol) for key, value in expected.items()
        )
    return type(expected) is type(actual) and expected == actual


def _same_number(
    expected: int | float, actual: int | float, rel_tol: float, abs_tol: float
) -> bool:
    if expected == actual or (isinstance(expected, int) and isinstance(actual, int)):
        return expected == actual
    if math.isnan(expected) and math.isnan(actual):
        return True
    try:
        return math.isclose(expected, actual, rel_tol=rel_tol, abs_tol=abs_tol)
    except OverflowError:  # an int beyond every float is close to no float
        return False


def decode(ground_truth: Any, reward: str) -> Any:
    """Ground truth as a structure; columns that mix shapes store it as JSON text."""
    if not isinstance(ground_truth, str):
        return ground_truth
    try:
        return json.loads(ground_truth)
    except ValueError as error:
        raise UserError(
            f'ground truth for the reward "{reward}" is not JSON ({error}): {ground_truth[:80]!r}'
        ) from error
