"""The build graph: steps, fingerprints, reuse.

A step's fingerprint is the hash of its verb and version, the settings that decide its result, the
fingerprints of its inputs and of its data. Its output lives under that fingerprint, so a step whose
manifest exists is reused, the same command resumes, and one changed setting reruns exactly what
depends on it. Steps are plain values: planning needs neither torch nor ray.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from bar_ray import storage
from bar_ray.log import some, titled
from bar_ray.recipe import meaning
from bar_ray.types import Artifact

# verb -> (function, version); raise the version when equal inputs give another output than before
VERBS: dict[str, tuple[str, int]] = {
    "world": ("bar_ray.tiny.verbs:world", 7),
    "init": ("bar_ray.tiny.verbs:init", 3),
    "tokenizer": ("bar_ray.model.adopt:tokenizer", 1),
    "check": ("bar_ray.check:run", 2),
    "prepare": ("bar_ray.data.prepare:run", 1),
    "tokenise": ("bar_ray.data.tokenise:run", 1),
    "sample": ("bar_ray.data.sample:run", 4),
    "train": ("bar_ray.stages.start:language_model", 2),
    "midtrain": ("bar_ray.stages.start:language_model", 2),
    "sft": ("bar_ray.stages.start:language_model", 2),
    "rlvr": ("bar_ray.stages.rlvr:run", 3),
    "rollouts": ("bar_ray.stages.rollouts:run", 1),
    "import": ("bar_ray.model.adopt:run", 1),
    "branch": ("bar_ray.model.branch:run", 1),
    "fisher": ("bar_ray.stages.start:fisher", 1),
    "merge": ("bar_ray.merge:run", 1),
    "subset": ("bar_ray.merge:subset", 1),
    "average": ("bar_ray.baselines.dense:merge", 1),
    "btx": ("bar_ray.baselines.dense:btx", 1),
    "lora": ("bar_ray.stages.start:lora", 1),
    "adapter_router": ("bar_ray.baselines.lora:train_router", 1),
    "routed": ("bar_ray.baselines.lora:evaluate", 1),
    "route": ("bar_ray.stages.start:router", 2),
    "evaluate": ("bar_ray.evaluate.run:run", 2),
}


@dataclass(frozen=True)
class Step:
    """One node: what to run, on what, and where its output goes.

    `settings` is the setting tree the verb receives; only its meaning is hashed. `data` maps a
    name to a data URI and its content fingerprint. `arm` tells people which of several models a
    step is for.
    """

    verb: str
    name: str
    settings: Any
    inputs: Mapping[str, "Step"] = field(default_factory=dict)
    data: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    storage_uri: str = ""
    arm: str = field(default="", compare=False, kw_only=True)

    @cached_property
    def fingerprint(self) -> str:
        described = {
            "verb": self.verb,
            "version": VERBS[self.verb][1],
            "settings": meaning(self.settings),
            # In order: it decides the slots of a merge and the places of a mixture.
            "inputs": [(key, step.fingerprint) for key, step in self.inputs.items()],
            "data": [(key, content) for key, (_, content) in self.data.items()],
        }
        canonical = json.dumps(described, sort_keys=True, default=str)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]

    @cached_property
    def artifact(self) -> Artifact:
        uri = storage.join(self.storage_uri, "artifacts", self.verb, self.name, self.fingerprint)
        return Artifact(uri, self.fingerprint, self.verb, self.name)

    @property
    def label(self) -> str:
        return f"{self.verb} {titled(self.name, self.arm)}"


def inputs_of(step: Step, kind: str) -> dict[str, Step]:
    """The inputs called `kind:NAME`, by name, in order."""
    prefix = f"{kind}:"
    named = {name: each for name, each in step.inputs.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): each for name, each in named.items()}


KEEP_SHAPE = {"train", "midtrain", "sft", "rlvr", "lora", "route", "average"}


def shape_of(model: Step) -> tuple[Any, ...]:
    """Equal for models that differ in nothing but weights, as far as their steps tell."""
    source = model.inputs.get("model") or model.inputs.get("base")
    if source is None or model.verb not in KEEP_SHAPE:
        return model.verb, len(inputs_of(model, "expert") or inputs_of(model, "model"))
    top_k = model.settings.get("top_k") if isinstance(model.settings, dict) else None
    return *shape_of(source), *([top_k] if top_k else [])


@dataclass(frozen=True)
class Published(Step):
    """A step whose output is there, whatever made it: a version from the registry."""

    known: str = field(default="", kw_only=True)

    @cached_property
    def fingerprint(self) -> str:
        return self.known


@dataclass(frozen=True)
class Planned:
    """A step with the plan's decision and its reason."""

    step: Step
    reused: bool
    reason: str


def topological(targets: Iterable[Step]) -> list[Step]:
    """Every step the targets need, inputs first, each once."""
    ordered: dict[str, Step] = {}

    def visit(step: Step) -> None:
        if key(step) not in ordered:
            for needed in step.inputs.values():
                visit(needed)
            ordered[key(step)] = step

    for target in targets:
        visit(target)
    return list(ordered.values())


def key(step: Step) -> str:
    return step.artifact.uri


def plan(targets: Iterable[Step]) -> list[Planned]:
    """What would run and what is reused, inputs first."""
    planned: dict[str, Planned] = {}
    for step in topological(targets):
        reused = storage.read_manifest(step.artifact.uri) is not None
        needed = [planned[key(each)] for each in step.inputs.values()]
        stale = [each.step.label for each in needed if not each.reused]
        planned[key(step)] = Planned(step, reused, _reason(step, reused, stale))
    return list(planned.values())


def _reason(step: Step, reused: bool, stale: list[str]) -> str:
    if reused:
        return "finished"
    if stale:
        return f"needs {some(stale)}"
    siblings = storage.join(step.storage_uri, "artifacts", step.verb, step.name)
    return "settings, data or inputs changed" if storage.exists(siblings) else "never ran"


def render_plan(planned: list[Planned]) -> str:
    """The plan as a table for people."""
    width = max(len(p.step.label) for p in planned)
    lines = [
        f"  {'reuse' if p.reused else 'run  '}  {p.step.label:<{width}}  "
        f"{p.step.fingerprint}  {p.reason}"
        for p in planned
    ]
    runs = sum(not p.reused for p in planned)
    return "\n".join([*lines, f"{runs} to run, {len(planned) - runs} reused"])
