"""Rules that make one tensor of several which went different ways from a common base.

All compute in fp32 and round once, to the type of the tensors. Where nothing moved, every rule
gives the base back bit for bit.
"""

from collections.abc import Mapping, Sequence

import torch

from bar_ray.recipe import Merge
from kernels import average

Tensors = Sequence[torch.Tensor]
NamedTensors = Mapping[str, torch.Tensor]


def combine(
    settings: Merge, base: torch.Tensor, models: NamedTensors, fishers: NamedTensors
) -> torch.Tensor:
    """One tensor of several models, by the recipe's rule.

    Args:
        models: by name, in order.
        fishers: their Fisher information, for the rule of that name.
    """
    values = list(models.values())
    match settings.rule:
        case "one":
            return models[settings.expert or next(iter(models))]
        case "sum":
            return sum_of_deltas(base, values, settings.scale)
        case "ties":
            return ties(base, values, settings.density, settings.scale)
        case "fisher":
            return fisher(values, [fishers[name] for name in models])
    return average.reference([base, *values] if settings.include_base else values)


def sum_of_deltas(base: torch.Tensor, values: Tensors, scale: float) -> torch.Tensor:
    """base + scale * sum(value - base) (task arithmetic, Ilharco et al. 2023)."""
    total = sum(value.float() - base.float() for value in values)
    return (base.float() + scale * total).to(base.dtype)


def ties(base: torch.Tensor, values: Tensors, density: float, scale: float) -> torch.Tensor:
    """TIES (Yadav et al. 2023): trim each delta, elect a sign, average those that agree with it.

    Args:
        density: share of each delta's entries that is kept, the largest in magnitude.
        scale: factor of the merged delta (the paper's lambda).
    """
    deltas = torch.stack([trim(value.float() - base.float(), density) for value in values])
    sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    agrees = deltas.sign() == sign
    merged = torch.where(agrees, deltas, 0.0).sum(0) / agrees.sum(0).clamp(min=1)
    return (base.float() + scale * merged).to(base.dtype)


def trim(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The `density` of entries that are largest in magnitude, zero elsewhere."""
    count = int(density * delta.numel())
    kept = delta.abs().flatten().argsort(descending=True, stable=True)[:count]
    trimmed = torch.zeros_like(delta).flatten()
    trimmed[kept] = delta.flatten()[kept]
    return trimmed.view_as(delta)


def fisher(values: Tensors, weights: Tensors) -> torch.Tensor:
    """Mean weighted by each model's diagonal Fisher information (Matena and Raffel 2022).

    Entries that no model's data say anything about get the plain mean.
    """
    if all(torch.equal(values[0], value) for value in values[1:]):
        return values[0]
    floor = torch.finfo(torch.float32).tiny
    shares = [weight.float() + floor for weight in weights]
    total = sum(value.float() * share for value, share in zip(values, shares, strict=True))
    return (total / sum(shares)).to(values[0].dtype)
