"""Global batches of packed rows for language-model stages.

Shapes: M rows of a micro-batch, S tokens per row.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from bar_ray.data.mixture import Mixture, steps_of
from bar_ray.data.pack import TokenShard
from bar_ray.recipe import Stage


@dataclass(frozen=True)
class MicroBatch:
    """Rows of one forward pass; `loss` is 1 where a token is to be predicted."""

    tokens_MS: torch.Tensor
    loss_MS: torch.Tensor
    positions_MS: torch.Tensor

    def to(self, device: torch.device) -> "MicroBatch":
        return MicroBatch(*(getattr(self, f).to(device) for f in self.__dataclass_fields__))


@dataclass(frozen=True)
class GlobalBatch:
    """This rank's micro-batches and the number of loss tokens over all ranks."""

    micro: list[MicroBatch]
    loss_tokens: int
    tokens: int


class Batches:
    """`batches(step, rank, world)` -> this rank's part of the global batch of that step."""

    def __init__(self, folders: Sequence[str], shares: Sequence[float], stage: Stage, seed: int):
        self.shards = [TokenShard(folder) for folder in folders]
        num_rows = sum(len(shard) for shard in self.shards)
        self.stage = stage
        self.num_steps = steps_of(stage.steps, stage.epochs, stage.batch_size, num_rows)
        sizes = [len(shard) for shard in self.shards]
        self.mixture = Mixture(sizes, shares, self.num_steps * stage.batch_size, seed)

    def __call__(self, step: int, rank: int, world: int) -> GlobalBatch:
        size = self.stage.batch_size
        places = range(step * size, (step + 1) * size)
        loss_tokens = sum(int(self._row("loss", place).sum()) for place in places)
        tokens = size * self.stage.seq_len
        return GlobalBatch(list(self._micro(places[rank::world])), loss_tokens, tokens)

    def _micro(self, places: Sequence[int]) -> Iterator[MicroBatch]:
        for start in range(0, len(places), self.stage.run.micro_batch):
            chunk = places[start : start + self.stage.run.micro_batch]
            yield MicroBatch(
                *(self._stack(name, chunk) for name in ("tokens", "loss", "positions"))
            )

    def _stack(self, name: str, places: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._row(name, place) for place in places])).long()

    def _row(self, name: str, place: int) -> np.ndarray:
        shard = self.shards[self.mixture.source[place]]
        return getattr(shard, name)[self.mixture.row[place]]
