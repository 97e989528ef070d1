"""What a plan costs before it runs: tokens, FLOPs, memory, accelerator hours, wall time, price.

Counted are trainings and rollouts; evaluation, reading and writing are not. FLOPs and memory come
from `bar_ray.cost`. Seconds are FLOPs, those of recomputed activations too, at a share of the
accelerator's peak: the share that was measured for steps of the same kind, or the assumed one.
Rollouts are bound by memory: an engine reads its weights and the keys and values of all its
sequences for every token that each of them gets.
"""

import contextlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from bar_ray import storage
from bar_ray.cost import Accelerator, Shape
from bar_ray.graph import Planned, Step
from bar_ray.log import duration
from bar_ray.recipe import STAGES, Planning, Recipe, Rlvr, Run, Stage
from bar_ray.types import UserError

GIB = 2**30
USABLE = 0.92  # of an accelerator's memory: the rest is the runtime's and fragments
TRAINED = (*STAGES, "train", "route", "lora")
RECENT_RUNS, RECENT_BYTES = 3, 1 << 20
MOST_WORKERS = 64  # as far as suggestions go
HOUR = 3600.0


@dataclass(frozen=True)
class NodeType:
    """Machines of one kind in a cluster file; prices are per machine and hour."""

    name: str
    instance: str
    accelerator: Accelerator
    count: int
    is_spot: bool
    resources: Mapping[str, float]
    prices: Mapping[str, float]

    @property
    def price(self) -> float | None:
        """Of one accelerator and hour."""
        known = self.prices.get("spot" if self.is_spot else "on_demand")
        return None if known is None else known / self.count


@dataclass(frozen=True)
class Estimate:
    """Of one step. `hours` are accelerator hours by kind.

    `problem` says why it cannot run on these machines, `note` what could not be reckoned.
    """

    step: Step
    tokens: float
    flops: float
    memory_gib: float
    hours: Mapping[str, float]
    wall_s: float
    price: float | None
    problem: str = ""
    note: str = ""


# --- machines -------------------------------------------------------------------------------------


def node_types(settings: Planning) -> list[NodeType]:
    """Those of a `ray up` file that have accelerators."""
    if not settings.cluster:
        return []
    prices = _yaml(settings.prices) if settings.prices else {}
    found = []
    for name, node in _yaml(settings.cluster).get("available_node_types", {}).items():
        config = node.get("node_config", {})
        instance = config.get("InstanceType") or config.get("machineType") or ""
        known = Accelerator.of_instance(instance)
        if known is None:
            continue
        accelerator, count = known
        spot = "InstanceMarketOptions" in config or "spot" in str(config.get("scheduling")).lower()
        custom, price = node.get("resources", {}), prices.get(instance, {})
        found.append(NodeType(name, instance, accelerator, count, spot, custom, price))
    return found


def _yaml(path: str) -> dict[str, Any]:
    try:
        found = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"plan: cannot read {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, dict):
        raise UserError(f"plan: {path} must hold names and values")
    return found


def serving(types: Sequence[NodeType], gpus: float, resources: Mapping[str, float]) -> Any:
    """The first node type that a worker of this demand may run on, or None."""
    wanted = {name for name, amount in resources.items() if amount}
    for each in types:
        if gpus and gpus <= each.count and wanted <= each.resources.keys():
            return each
    return None


# --- one step -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimator:
    """What the estimates of one recipe have in common."""

    recipe: Recipe
    base: Shape
    types: Sequence[NodeType]
    measured: Mapping[str, float]  # verb -> MFU

    def of(self, step: Step) -> Estimate:
        stage, shape = step.settings["stage"], self.shape(step)
        found = self._training(step, stage, shape)
        return self._with_rollouts(found, stage, shape) if isinstance(stage, Rlvr) else found

    def shape(self, step: Step) -> Shape:
        """Of the model that a step trains."""
        if step.verb == "route":
            merge = step.inputs["model"]
            experts = sum(name.startswith("expert:") for name in merge.inputs) + 1
            return replace(self.base, experts=experts, active=step.settings["top_k"] or experts)
        in_branch = step.verb in STAGES and "branch" in {s.verb for s in _chain(step)}
        return replace(self.base, experts=2, active=2) if in_branch else self.base

    def _training(self, step: Step, stage: Stage, shape: Shape) -> Estimate:
        run, rows = stage.run, stage.steps * stage.batch_size
        length = stage.seq_len
        if isinstance(stage, Rlvr):
            rows, length = rows * stage.grpo.samples, self._length(stage)
        tokens = float(rows * length)
        per_token = shape.flops(stage.learn, length)
        flops = tokens * per_token.total
        memory = self._gib(stage, run, shape)
        node = serving(self.types, run.gpus_per_worker, run.resources)
        if node is None:
            problem = self._nowhere(run.gpus_per_worker, run.resources)
            return Estimate(step, tokens, flops, memory, {}, 0.0, None, problem)
        again = tokens * per_token.forward if run.activation_checkpointing else 0.0
        share = self.measured.get(step.verb)
        work = flops / share if share else (flops + again) / self.recipe.plan.utilisation
        seconds = work / node.accelerator.flops
        hours = {node.accelerator.name: seconds / HOUR}
        price = None if node.price is None else seconds / HOUR * node.price
        wall = seconds / (run.num_workers * run.gpus_per_worker)
        problem = self._too_large(stage, shape, node)
        note = "" if stage.steps else UNKNOWN_STEPS
        return Estimate(step, tokens, flops, memory, hours, wall, price, problem, note)

    def _length(self, stage: Rlvr) -> int:
        """Mean tokens of a prompt with its completion."""
        answer = self.recipe.plan.answer * stage.rollout.max_tokens
        return math.ceil(answer + self.recipe.plan.prompt)

    def _nowhere(self, gpus: float, resources: Mapping[str, float]) -> str:
        if not self.types or not gpus:
            return ""
        asked = [name for name, amount in resources.items() if amount]
        wanted = " and ".join([f"{gpus:g} GPU{'s' * (gpus != 1)}", *asked])
        there = ", ".join(each.instance for each in self.types)
        return f"no machine of {self.recipe.plan.cluster} ({there}) offers {wanted}"

    def _too_large(self, stage: Stage, shape: Shape, node: NodeType) -> str:
        there = USABLE * node.accelerator.memory_gib * stage.run.gpus_per_worker
        if self._gib(stage, stage.run, shape) <= there:
            return ""
        needed = f"needs {self._gib(stage, stage.run, shape):.0f} GiB of {there:.0f} a worker"
        for changes in _ways_out(stage):
            if self._gib(stage, replace(stage.run, **changes), shape) <= there:
                told = ", ".join(f"run.{name}={value}".lower() for name, value in changes.items())
                return f"does not fit {node.instance}: {needed}; fits with {told}"
        return f"does not fit {node.instance}: {needed}; take a node type with more memory"

    def _gib(self, stage: Stage, run: Run, shape: Shape) -> float:
        settings = stage.learn, run, stage.seq_len, stage.dtype
        return shape.memory(*settings, optimizer=stage.optimizer).total / GIB

    def _with_rollouts(self, found: Estimate, stage: Rlvr, shape: Shape) -> Estimate:
        """With the engines' hours; a synchronous stage waits for each side in turn."""
        rollout = stage.rollout
        node = serving(self.types, rollout.gpus_per_engine, rollout.resources)
        if node is None:
            problem = self._nowhere(rollout.gpus_per_engine, rollout.resources)
            return replace(found, problem="; ".join(filter(None, (found.problem, problem))))
        there = USABLE * node.accelerator.memory_gib * rollout.gpus
        rate = decode_rate(shape, node, stage, self._length(stage))
        if not rate:
            weights = 2 * sum(shape.weights().values()) / GIB
            problem = (
                f"an engine of {rollout.gpus:g} x {node.accelerator.name} has "
                f"{there:.0f} GiB for {weights:.0f} GiB of weights and the KV cache of one answer; "
                "raise rollout.tensor_parallel"
            )
            return replace(found, problem="; ".join(filter(None, (found.problem, problem))))
        answers = stage.steps * stage.batch_size * stage.grpo.samples
        drawn = answers * self.recipe.plan.answer * stage.rollout.max_tokens
        seconds = drawn / rate
        hours = dict(found.hours)
        engine = seconds / HOUR * rollout.tensor_parallel
        hours[node.accelerator.name] = hours.get(node.accelerator.name, 0.0) + engine
        wall = seconds / rollout.num_engines
        both = max(found.wall_s, wall) if stage.max_staleness else found.wall_s + wall
        price = None
        if found.price is not None and node.price is not None:
            price = found.price + engine * node.price
        return replace(found, hours=hours, wall_s=both, price=price)


UNKNOWN_STEPS = "left out: as many steps as its `epochs` take, which tokenised data would tell"


def _chain(step: Step) -> Iterator[Step]:
    """A step and what its model was trained from."""
    while step is not None:
        yield step
        step = step.inputs.get("model")


def _ways_out(stage: Stage) -> Iterator[dict[str, Any]]:
    """Settings that need less memory, the cheapest first."""
    run, most = stage.run, 2 if isinstance(stage, Rlvr) else 3
    changes: dict[str, Any] = {}
    if not run.activation_checkpointing:
        changes["activation_checkpointing"] = True
        yield dict(changes)
    if run.micro_batch > 1:
        changes["micro_batch"] = 1
        yield dict(changes)
    for zero in range(run.zero_stage + 1, most + 1):
        changes["zero_stage"] = zero
        yield dict(changes)
    workers = 2 * run.num_workers
    while workers <= MOST_WORKERS:
        yield {**changes, "num_workers": workers}
        workers *= 2


def decode_rate(shape: Shape, node: NodeType, stage: Rlvr, length: int) -> float:
    """Tokens per second of an engine at its fullest; 0 when not one answer fits beside the weights.

    The KV cache holds answers half of `length` long on average.
    """
    parallel, accelerator = stage.rollout.tensor_parallel, node.accelerator
    weights = 2.0 * sum(shape.weights().values())
    one = shape.kv_cache(length) / 2
    free = USABLE * accelerator.memory_gib * GIB * stage.rollout.gpus - weights
    sequences = min(stage.rollout.max_num_seqs, int(free / one))
    if sequences < 1:
        return 0.0
    return sequences * accelerator.bytes_per_s * parallel / (weights + sequences * one)


# --- a whole plan ---------------------------------------------------------------------------------


def of_plan(planned: Sequence[Planned], recipe: Recipe) -> list[Estimate]:
    """Of every training that would run; none when the sizes of the base are not known."""
    base = base_shape(recipe)
    if base is None:
        return []
    estimator = Estimator(recipe, base, node_types(recipe.plan), measured(recipe.storage))
    return [estimator.of(p.step) for p in planned if not p.reused and p.step.verb in TRAINED]


def hours(found: Sequence[Estimate]) -> float:
    """Accelerator hours of all, whatever their kind."""
    return sum(value for each in found for value in each.hours.values())


def measured(storage_uri: str) -> dict[str, float]:
    """The MFU of recent trainings on a storage, by verb: the median of what the last runs noted."""
    runs = storage.join(storage_uri, "runs")
    files = [f for f in storage.list_files(runs, True) if "/metrics.jsonl" in f]
    found: dict[str, list[float]] = {}
    for file in files[-RECENT_RUNS:]:
        for line in storage.read_tail(file, RECENT_BYTES).splitlines()[1:]:
            with contextlib.suppress(ValueError):  # cut off
                row = json.loads(line)
                if row.get("mfu"):
                    found.setdefault(row["verb"], []).append(row["mfu"])
    return {verb: median(values) for verb, values in found.items()}


def base_shape(recipe: Recipe) -> Shape | None:
    """Sizes of the dense base, from its config.json."""
    if recipe.tiny is not None or not recipe.base.post_trained:
        return None
    uri = recipe.base.post_trained
    if storage.read_manifest(uri):  # one of ours: remote files lie one folder deeper
        uri = storage.join(uri, storage.verify(uri).data)
    return Shape.of(storage.read_json(storage.join(uri, "config.json")))


def render(found: Sequence[Estimate]) -> str:
    """A table for people, with totals."""
    rows = [("", "tokens", "FLOPs", "GiB a worker", "accelerator hours", "wall", "price")]
    rows += [_row(each.step.label, each) for each in found]
    total: dict[str, float] = {}
    for each in found:
        for kind, hours in each.hours.items():
            total[kind] = total.get(kind, 0.0) + hours
    prices = [each.price for each in found]
    price = None if None in prices else sum(prices)
    tokens, flops = sum(e.tokens for e in found), sum(e.flops for e in found)
    sums = (f"{tokens:.3g}", f"{flops:.3g}", "", _hours(total), "", _price(price))
    rows.append(("in all", *sums))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  " + "  ".join(f"{c:<{w}}" for c, w in zip(r, widths, strict=True)) for r in rows]
    said = [(each.step.label, text) for each in found for text in (each.problem, each.note)]
    lines += [f"  {label}: {text}" for label, text in said if text]
    return "\n".join(line.rstrip() for line in lines)


def _row(label: str, each: Estimate) -> tuple[str, ...]:
    wall = duration(each.wall_s) if each.wall_s else "-"
    sizes = f"{each.tokens:.3g}", f"{each.flops:.3g}", f"{each.memory_gib:.1f}"
    return (label, *sizes, _hours(each.hours), wall, _price(each.price))


def _hours(hours: Mapping[str, float]) -> str:
    return " + ".join(f"{value:,.1f} {kind}" for kind, value in hours.items()) or "-"


def _price(price: float | None) -> str:
    return "-" if price is None else f"{price:,.0f}"
