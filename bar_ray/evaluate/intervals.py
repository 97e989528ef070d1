"""95 % intervals of scores over test items.

Wilson's score interval for items that are right or wrong: it says something at 0 and 100 % too,
where the usual standard error is zero (Bowyer et al. 2025, arXiv 2503.01747). Scores between are
bounded by it: of all items with that mean, those that are right or wrong vary the most.
"""

import math
from collections.abc import Sequence

Z95 = 1.959964


def wilson(score: float, items: int) -> tuple[float, float]:
    """(low, high) percent of a mean score, 0 to 1, of so many items."""
    centre, half = _centre(score, items), _half(score, items)
    low, high = 100 * (centre - half), 100 * (centre + half)
    return (0.0 if score == 0 else max(0.0, low), 100.0 if score == 1 else min(100.0, high))


def of_mean(scores: Sequence[tuple[float, float, int]]) -> tuple[float, float]:
    """(low, high) percent of a weighted mean: weight, score and items of each set of items.

    Variances are those at Wilson's centres, which are never zero.
    """
    variance = sum(
        weight**2 * (p := _centre(score, items)) * (1 - p) / (items + Z95**2)
        for weight, score, items in scores
    )
    mean = sum(weight * score for weight, score, _ in scores)
    half = Z95 * math.sqrt(variance)
    return 100 * max(0.0, mean - half), 100 * min(1.0, mean + half)


def _centre(score: float, items: int) -> float:
    return (score + Z95**2 / (2 * items)) / (1 + Z95**2 / items)


def _half(score: float, items: int) -> float:
    spread = score * (1 - score) / items + Z95**2 / (4 * items**2)
    return Z95 * math.sqrt(spread) / (1 + Z95**2 / items)
