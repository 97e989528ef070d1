"""The freeze table applied to a model: which tensors learn, and how fast.

How far the shared weights move in one expert decides whether the average of all experts still
works, so a role has its own learning rate and not only a switch.
"""

from dataclasses import asdict

import torch
from torch import nn

from bar_ray.model.tensors import role_of
from bar_ray.recipe import Learn


def apply(model: nn.Module, learn: Learn) -> list[dict]:
    """Freeze the roles whose rate is 0 and return optimizer groups of the others.

    Each group holds {"role", "scale", "params"}; the learning rate of a step is `lr * scale`.
    A frozen tensor gets no gradient and no optimizer state.
    """
    rates = {**asdict(learn), "adapter": 1.0}  # adapters are there to learn
    groups: dict[str, dict] = {}
    for name, parameter in model.named_parameters():
        role = role_of(name)
        parameter.requires_grad_(rates[role] > 0)
        if rates[role] > 0:
            group = groups.setdefault(role, {"role": role, "scale": rates[role], "params": []})
            group["params"].append(parameter)
    return list(groups.values())


def trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """The tensors that learn, by parameter name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}
