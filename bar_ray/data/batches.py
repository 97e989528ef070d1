"""Global batches of packed rows for language-model stages.

Shapes: M rows of a micro-batch, S tokens per row.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

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
    counts: bool = True  # False: another rank has a row more, and all must make as many passes

    def to(self, device: torch.device) -> "MicroBatch":
        tensors = (self.tokens_MS, self.loss_MS, self.positions_MS)
        return MicroBatch(*(tensor.to(device) for tensor in tensors), self.counts)


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
        micro = list(self._micro(places[rank::world]))
        passes = math.ceil(math.ceil(size / world) / self.stage.run.micro_batch)
        if len(micro) < passes:
            [first] = self._micro(places[:1])
            nothing = torch.zeros_like(first.loss_MS)
            micro.append(replace(first, loss_MS=nothing, counts=False))
        return GlobalBatch(micro, loss_tokens, tokens)

    def _micro(self, places: Sequence[int]) -> Iterator[MicroBatch]:
        for start in range(0, len(places), self.stage.run.micro_batch):
            chunk = places[start : start + self.stage.run.micro_batch]
            tokens, loss, positions = (
                self._stack(name, chunk) for name in ("tokens", "loss", "positions")
            )
            yield MicroBatch(tokens, loss, positions)

    def _stack(self, name: str, places: Sequence[int]) -> torch.Tensor:
        return torch.from_numpy(np.stack([self._row(name, place) for place in places])).long()

    def _row(self, name: str, place: int) -> np.ndarray:
        shard = self.shards[self.mixture.source[place]]
        return getattr(shard, name)[self.mixture.row[place]]
