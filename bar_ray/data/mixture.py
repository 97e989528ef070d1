"""The order of samples: a pure function of (seed, step), whatever the number of workers.

Each slot of a global batch belongs to a source by its share of the mixture, spread evenly through
the run; within a source, rows follow a new permutation every epoch. A checkpoint needs only the
step.
"""

from collections.abc import Sequence

import numpy as np

from bar_ray.types import UserError

GOLDEN = 0.6180339887498949


class Mixture:
    """Which row of which source stands at each place of the whole run.

    `sources` are the numbers of rows, `shares` the mixture; `source[g]` and `row[g]` give sample g.
    """

    def __init__(
        self, sources: Sequence[int], shares: Sequence[float], num_samples: int, seed: int
    ) -> None:
        if min(sources) == 0:
            raise UserError("a dataset of the mixture has no rows")
        edges = np.cumsum(np.asarray(shares, dtype=np.float64) / np.sum(shares))
        # A golden-ratio sequence fills every stretch of the run in proportion to the shares.
        offset = np.random.default_rng([seed, 0]).random()
        places = (offset + GOLDEN * np.arange(num_samples)) % 1.0
        self.source = np.minimum(np.searchsorted(edges, places, side="right"), len(sources) - 1)
        self.row = np.empty(num_samples, dtype=np.int64)
        for index, num_rows in enumerate(sources):
            mine = np.flatnonzero(self.source == index)
            self.row[mine] = _epochs(num_rows, len(mine), seed, index)

    def __len__(self) -> int:
        return len(self.row)


def _epochs(num_rows: int, count: int, seed: int, index: int) -> np.ndarray:
    """`count` rows: one permutation of the source after another."""
    num_epochs = -(-count // num_rows)
    epochs = [
        np.random.default_rng([seed, index + 1, epoch]).permutation(num_rows)
        for epoch in range(num_epochs)
    ]
    return np.concatenate(epochs)[:count] if epochs else np.empty(0, dtype=np.int64)


def steps_of(steps: int, epochs: float, batch_size: int, num_rows: int) -> int:
    """The number of optimizer steps: as given, or `epochs` passes over the rows."""
    return steps or max(1, round(epochs * num_rows / batch_size))
