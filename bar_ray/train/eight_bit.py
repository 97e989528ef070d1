"""Training in 6 bytes per weight that learns instead of 16: for one GPU, without DeepSpeed.

Weights and gradients stay in bfloat16, and both moments of Adam take 8 bits each with a scale per
256 of them (Dettmers et al. 2022, arXiv 2110.02861), by torchao. There is no fp32 copy that would
collect small updates, so a weight is rounded up or down at random, by how near it is to either.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from bar_ray.types import UserError

ENDINGS = ("", ".codes", ".scale")
Parts = dict[str, torch.Tensor]  # of a moment, by the ending of their names


def adamw(
    groups: Iterable[dict[str, Any]], betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer: adamw_8bit needs torchao: pip install 'bar_ray[eight_bit]'"
        ) from error
    rounded = {"bf16_stochastic_round": True}
    return AdamW8bit(groups, lr=0.0, betas=betas, weight_decay=weight_decay, **rounded)


class Alone:
    """What training uses of a DeepSpeed engine, for one worker whose optimizer is its own."""

    def __init__(self, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)
        self.optimizer = optimizer

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        """Gradients of one worker need no reduction."""

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def step(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


def parts_of(moment: torch.Tensor) -> Parts:
    """A moment as it is kept: codes and scales, or itself where it is too small for blocks."""
    codes = getattr(moment, "codes", None)
    if codes is None:
        return {"": moment}
    return {".codes": codes, ".scale": moment.scale}


def moment_of(parts: Mapping[str, torch.Tensor], weight: torch.Tensor, signed: bool) -> Any:
    """The moment of a weight from what `parts_of` gave."""
    if "" in parts:
        return parts[""].to(weight.device)
    from torchao.optim.subclass_8bit import OptimState8bit

    codes, scale = (parts[name] for name in (".codes", ".scale"))
    block = codes.numel() // scale.numel()
    moment = OptimState8bit.zeros(codes.shape, signed, block, weight.device, weight.dtype)
    moment.codes.copy_(codes)
    moment.scale.copy_(scale)
    return moment
