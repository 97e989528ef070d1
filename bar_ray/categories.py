"""Categories of tests and the sets they form: `math/gsm8k` and `math/minerva` form the set `math`.

In the overall score sets count alike, and within a set its categories, as in the paper: an
unweighted mean over seven categories, each the mean of its benchmarks.
"""

from collections import Counter
from collections.abc import Iterable, Mapping

OVERALL = "overall"


def set_of(category: str) -> str:
    return category.partition("/")[0]


def plain(category: str) -> str:
    """In names of files and steps, which have no slash."""
    return category.replace("/", "-")


def sets(categories: Iterable[str]) -> list[str]:
    """The sets of several categories, or of one with a slash, each once."""
    return list(dict.fromkeys(set_of(name) for name in categories if "/" in name))


def members(name: str, categories: Iterable[str]) -> list[str]:
    """The categories that a score is the mean of: those of a set, all of them for `OVERALL`."""
    return [each for each in categories if name in (OVERALL, each) or set_of(each) == name]


def weights(categories: Iterable[str]) -> dict[str, float]:
    """What each counts in the overall score; their sum is 1."""
    names = list(categories)
    sizes = Counter(map(set_of, names))
    return {name: 1 / (len(sizes) * sizes[set_of(name)]) for name in names}


def with_means(scores: Mapping[str, float]) -> dict[str, float]:
    """Scores by category, with those of their sets and the overall one."""
    found = dict(scores)
    for name in (*sets(scores), OVERALL):
        counted = weights(members(name, scores))
        found[name] = sum(weight * scores[each] for each, weight in counted.items())
    return found
