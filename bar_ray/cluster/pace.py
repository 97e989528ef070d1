"""When a run will end, told from how long its steps took so far."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from statistics import fmean


class Pace:
    """Seconds of finished steps by verb, since a moment on the clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock, self.began = clock, clock()
        self.took: dict[str, list[float]] = {}

    def note(self, verb: str, seconds: float) -> None:
        """A step of this verb is finished, after so many seconds of its own."""
        self.took.setdefault(verb, []).append(seconds)

    def eta(self, left: Iterable[str]) -> float | None:
        """Seconds until steps of these verbs are finished; None while nothing is known.

        As many steps at a time as until now are assumed, and of a verb that was not seen yet, the
        mean of all.
        """
        known = [seconds for each in self.took.values() for seconds in each]
        if not sum(known):
            return None
        usual = {verb: fmean(each) for verb, each in self.took.items()}
        counts = Counter(left)
        work = sum(usual.get(verb, fmean(known)) * count for verb, count in counts.items())
        return (self.clock() - self.began) * work / sum(known)
