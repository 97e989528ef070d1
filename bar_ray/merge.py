"""Merge: k two-expert models and the branch they came from become one model of k + 1 experts.

As in the released recipe (BAR, section "Merge"): every shared tensor is the fp32 mean over the
models, the untrained branch among them (or what another rule of `model.average` makes of them); the
anchor is the mean of the anchors (byte for byte the anchor when none moved); each expert's FFN is
copied byte for byte; router row 0 is the mean of the anchors' rows and row i is the row of expert
i. Tensors stream: never more than a few are in memory.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch

from bar_ray import families
from bar_ray.families import Family
from bar_ray.graph import inputs_of
from bar_ray.model import average, tensors
from bar_ray.model.tensors import Checkpoint, Content, Spec
from bar_ray.recipe import Merge
from bar_ray.types import UserError
from kernels import average as kernel

STACKED_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")


def run(step: Any, run: Any) -> None:
    """Inputs: `base` (the branch), `expert:NAME` in the order of the slots, perhaps `fisher:NAME`.

    Settings: a `recipe.Merge`.
    """

    def checkpoints(kind: str) -> dict[str, Checkpoint]:
        return {name: Checkpoint(run.fetch(s)) for name, s in inputs_of(step, kind).items()}

    base, experts = Checkpoint(run.fetch(step.inputs["base"])), checkpoints("expert")
    with run.output(step, {"slots": ["anchor", *experts]}) as folder:
        merge(base, experts, folder, step.settings, checkpoints("fisher"))


def subset(step: Any, run: Any) -> None:
    """Inputs: `merged`, of some experts; `routed`, of more.

    Settings: `rows` of the latter's router, the anchor's first.
    """
    merged, routed = (Checkpoint(run.fetch(step.inputs[name])) for name in ("merged", "routed"))
    with run.output(step, {"rows": step.settings["rows"]}) as folder:
        with_rows(merged, routed, step.settings["rows"], folder)


def with_rows(merged: Checkpoint, routed: Checkpoint, rows: Sequence[int], folder: str) -> None:
    """Write the merged model with these rows of a trained router, the anchor's first.

    The gates are a softmax over the experts that are there, so what is left out is shared among
    the others in the proportions that the router has learned.
    """

    def content(name: str) -> Content:
        if name.endswith("mlp.gate.weight"):
            return routed[name][list(rows)].to(merged.spec(name).dtype)
        return partial(kernel.copy, merged.region(name))

    active = min(routed.config["num_experts_per_tok"], len(rows))
    config = {**merged.config, "num_experts_per_tok": active}
    specs = {name: merged.spec(name) for name in merged.names}
    tensors.write(folder, config, specs, content, side_files=merged.folder)


def merge(
    base: Checkpoint,
    experts: Mapping[str, Checkpoint],
    folder: str,
    settings: Merge,
    fishers: Mapping[str, Checkpoint] = MappingProxyType({}),
) -> None:
    """Write the merged model to `folder`; the experts by name, in the order of their slots."""
    family = _check(base, list(experts.values()))
    merger = Merger(base, experts, settings, fishers)
    config = family.with_experts(base.config, merger.slots)
    tensors.write(folder, config, merger.specs(), merger.content, side_files=base.folder)


class Merger:
    """Where each merged tensor comes from."""

    def __init__(
        self,
        base: Checkpoint,
        experts: Mapping[str, Checkpoint],
        settings: Merge,
        fishers: Mapping[str, Checkpoint],
    ) -> None:
        self.base, self.settings, self.by_name, self.fishers = base, settings, experts, fishers
        self.experts = list(experts.values())
        self.averaged = [base, *self.experts] if settings.include_base else self.experts
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

    def content(self, name: str) -> Content:
        if name.endswith("mlp.gate.weight"):
            rows = [expert[name][1] for expert in self.experts]
            return torch.stack([kernel.reference([m[name][0] for m in self.averaged]), *rows])
        match = STACKED_EXPERT.search(name)
        if match and match.group(1) != "0":
            expert = self.experts[int(match.group(1)) - 1]
            return self._mean([expert], STACKED_EXPERT.sub(".mlp.experts.1.", name))
        if match or self.settings.rule == "mean":
            return self._mean(self.averaged, name)
        values = {each: expert[name] for each, expert in self.by_name.items()}
        fishers = {each: weights[name] for each, weights in self.fishers.items()}
        return average.combine(self.settings, self.base[name], values, fishers)

    def _mean(self, models: list[Checkpoint], name: str) -> Content:
        """Streamed from file to file, where no type has to be changed; of one, its bytes."""
        regions, dtype = [model.region(name) for model in models], self.base.spec(name).dtype
        if any(model.spec(name).dtype != dtype for model in models):
            return kernel.reference([model[name] for model in models])
        if len(models) == 1:
            return partial(kernel.copy, regions[0])
        return partial(kernel.mean, regions, dtype)


def _check(base: Checkpoint, experts: list[Checkpoint]) -> Family:
    """The family of the branches, which must be one."""
    first = families.of_moe(base.config)
    for model in (base, *experts):
        family = families.of_moe(model.config)
        if family is None or family.num_experts(model.config) != 2:
            raise UserError(f"{model.folder} is not a two-expert branch, so it cannot be merged")
        if family != first:
            raise UserError(f"{model.folder} is a {family.moe} and {base.folder} a {first.moe}")
        if model.names != base.names:
            odd = sorted(set(model.names) ^ set(base.names))[0]
            raise UserError(f"{model.folder} and {base.folder} differ in tensors, such as {odd}")
        tensors.same_specs(base, model, base.names)
    return first
