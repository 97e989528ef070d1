"""Merge: k two-expert models and the branch they came from become one model of k + 1 experts.

As in the released recipe (BAR, section "Merge"): every shared tensor is the fp32 mean over the
models, the untrained branch among them; the anchor is the mean of the anchors (byte for byte the
anchor when none moved); each expert's FFN is copied byte for byte; router row 0 is the mean of the
anchors' rows and row i is the row of expert i. Tensors stream: never more than a few are in memory.
"""

import re
from typing import Any

import torch

from bar_ray.model import tensors
from bar_ray.model.tensors import Checkpoint, Spec
from bar_ray.types import UserError

STACKED_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def run(step: Any, run: Any) -> None:
    """Inputs: `base` (the branch) and `expert:NAME` in the order of the slots."""
    base = Checkpoint(run.fetch(step.inputs["base"]))
    names = [name for name in step.inputs if name.startswith("expert:")]
    experts = [Checkpoint(run.fetch(step.inputs[name])) for name in names]
    slots = {"slots": ["anchor", *(name.removeprefix("expert:") for name in names)]}
    with run.output(step, slots) as folder:
        merge(base, experts, folder, step.settings.include_base)


def merge(base: Checkpoint, experts: list[Checkpoint], folder: str, include_base: bool) -> None:
    """Write the merged model to `folder`."""
    _check(base, experts)
    merger = Merger(base, experts, include_base)
    config = {**base.config, "num_experts": merger.slots, "num_experts_per_tok": merger.slots}
    tensors.write(folder, config, merger.specs(), merger.tensor, side_files=base.folder)


class Merger:
    """Where each merged tensor comes from."""

    def __init__(self, base: Checkpoint, experts: list[Checkpoint], include_base: bool) -> None:
        self.base, self.experts = base, experts
        self.averaged = [base, *experts] if include_base else experts
        self.slots = len(experts) + 1

    def specs(self) -> dict[str, Spec]:
        specs = {}
        for name in self.base.names:
            spec = self.base.spec(name)
            if name.endswith("mlp.gate.weight"):
                specs[name] = Spec(spec.dtype, (self.slots, spec.shape[1]))
            elif ".mlp.experts.1." in name:
                for slot in range(1, self.slots):
                    specs[name.replace(".experts.1.", f".experts.{slot}.")] = spec
            else:
                specs[name] = spec
        return specs

    def tensor(self, name: str) -> torch.Tensor:
        if name.endswith("mlp.gate.weight"):
            rows = [expert[name][1] for expert in self.experts]
            return torch.stack([mean([m[name][0] for m in self.averaged]), *rows])
        match = STACKED_EXPERT.search(name)
        if match and match.group(1) != "0":
            expert = self.experts[int(match.group(1)) - 1]
            return expert[STACKED_EXPERT.sub(".mlp.experts.1.", name)]
        return mean([model[name] for model in self.averaged])


def mean(values: list[torch.Tensor]) -> torch.Tensor:
    """fp32 mean, rounded once to the tensors' type; equal tensors come back bit for bit."""
    if all(torch.equal(values[0], value) for value in values[1:]):
        return values[0]
    total = values[0].float().clone()
    for value in values[1:]:
        total += value.float()
    return (total / len(values)).to(values[0].dtype)


def _check(base: Checkpoint, experts: list[Checkpoint]) -> None:
    for model in (base, *experts):
        count = model.config.get("num_experts", model.config.get("num_local_experts"))
        if model.config.get("model_type") != "flex_olmo" or count != 2:
            raise UserError(f"{model.folder} is not a two-expert branch, so it cannot be merged")
        if model.names != base.names:
            odd = sorted(set(model.names) ^ set(base.names))[0]
            raise UserError(f"{model.folder} and {base.folder} differ in tensors, such as {odd}")
        tensors.same_specs(base, model, base.names)
