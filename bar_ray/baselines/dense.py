"""Dense models that went different ways, made one: the `average` verb and the `btx` verb.

`average` merges whole dense models into a dense one (the paper's "dense merging"). `btx` keeps
their FFNs apart as the experts of a MoE and merges the rest (Branch-Train-MiX, Sukhbaatar et al.
2024); what the BAR paper reports as BTX took every shared weight from one of them.
"""

from typing import Any

import torch

from bar_ray.graph import inputs_of
from bar_ray.model import average, branch, tensors
from bar_ray.model.tensors import Checkpoint
from bar_ray.recipe import Merge


def merge(step: Any, run: Any) -> None:
    """Inputs: `base`, `model:NAME` in order; settings: a `recipe.Merge`."""
    models = Models(step, run, step.settings)
    first = next(iter(models.by_name.values()))
    specs = {name: first.spec(name) for name in first.names}
    with run.output(step) as folder:
        tensors.write(folder, first.config, specs, models.tensor, side_files=first.folder)


def btx(step: Any, run: Any) -> None:
    """The same inputs; settings: `merge` (of the shared weights), router_std, seed."""
    models = Models(step, run, step.settings["merge"])
    experts = [models.base, *models.by_name.values()]
    std, seed = step.settings["router_std"], step.settings["seed"]
    with run.output(step, {"slots": ["base", *models.by_name]}) as folder:
        branch.upcycle(experts, models.tensor, folder, std, seed)


class Models:
    """The dense models of a step, and any of their tensors merged."""

    def __init__(self, step: Any, run: Any, settings: Merge) -> None:
        self.settings, self.base = settings, Checkpoint(run.fetch(step.inputs["base"]))
        models = inputs_of(step, "model")
        self.by_name = {name: Checkpoint(run.fetch(model)) for name, model in models.items()}
        for model in self.by_name.values():
            tensors.same_specs(self.base, model, self.base.names)

    def tensor(self, name: str) -> torch.Tensor:
        values = {each: model[name] for each, model in self.by_name.items()}
        return average.combine(self.settings, self.base[name], values, {})
