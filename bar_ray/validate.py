"""Combinations of settings that cannot work, refused before anything starts.

Every problem names the key and says what to write instead.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from bar_ray import families
from bar_ray.categories import OVERALL, sets
from bar_ray.recipe import (
    ROLES,
    SHARED,
    STAGES,
    Dataset,
    Decontaminate,
    Evaluate,
    Expert,
    Learn,
    Recipe,
    Rlvr,
    Stage,
)
from bar_ray.types import UserError

DOMAIN_NAME = r"[\w][\w.-]*"
SCHEDULES = ("constant", "linear", "cosine")
GRPO_CHOICES = {
    "objective": ("grpo", "gspo", "cispo"),
    "advantage": ("centred", "standardised"),
    "normalise": ("tokens", "sequences", "constant"),
    "kl_estimator": ("k1", "k2", "k3"),
}
MERGE_RULES = ("mean", "one", "sum", "ties", "fisher")
TRACKERS = {"wandb": "wandb", "mlflow": "mlflow-skinny"}  # and the packages they are in
SPACES = ("choice", "uniform", "loguniform")
DENSE_ROLES = (*SHARED, "expert")


def nearest(name: str, valid: Sequence[str]) -> str:
    """'did you mean x?' or an empty string."""
    close = difflib.get_close_matches(name, valid, n=1)
    return f"did you mean '{close[0]}'?" if close else ""


def pick(kind: str, name: str, known: Mapping[str, Any]) -> Any:
    """The entry of that name, or an error with the nearest one."""
    if name not in known:
        hint = nearest(name, list(known)) or f"there are {', '.join(known)}"
        raise UserError(f"no {kind} '{name}' in this recipe; {hint}")
    return known[name]


def check(recipe: Recipe) -> None:
    """Refuse impossible combinations before anything starts."""
    for problem in _problems(recipe):
        raise UserError(problem)


def _problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.experts:
        yield "experts: at least one expert is needed"
    for name, dataset in recipe.datasets.items():
        yield from _dataset_problems(f"datasets.{name}", dataset, recipe)
    for name, dataset in recipe.evaluate.categories.items():
        yield from _dataset_problems(f"evaluate.categories.{name}", dataset, recipe)
    if recipe.decontaminate is not None:
        yield from _decontaminate_problems(recipe.decontaminate, recipe)
    if recipe.tiny is None and not recipe.base.post_trained:
        yield "base.post_trained: give the dense checkpoint to branch from, or a `tiny` section"
    if recipe.tiny is not None:
        yield from _choice("tiny.family", recipe.tiny.family, families.DENSE)
        yield from _stage_problems("tiny.pretrain", recipe.tiny.pretrain, recipe, DENSE_ROLES)
        yield from _stage_problems("tiny.post_train", recipe.tiny.post_train, recipe, DENSE_ROLES)
    if recipe.plan.limit and not recipe.plan.cluster:
        yield "plan.limit is set without plan.cluster: there are no accelerator hours to compare"
    for name in recipe.tracking.trackers:
        yield from _choice("tracking.trackers", name, ("tensorboard", *TRACKERS))
        if name in TRACKERS and find_spec(name) is None:
            yield f"tracking.trackers: {name} is not installed: pip install {TRACKERS[name]}"
    for name, expert in recipe.experts.items():
        yield from _expert_problems(f"experts.{name}", expert, recipe)
    yield from _merge_problems(recipe)
    yield from _reproduce_problems(recipe)
    yield from _sweep_problems(recipe)
    yield from _router_problems(recipe)
    yield from _evaluate_problems(recipe.evaluate)


def _positive(key: str, section: Any, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        if getattr(section, name) <= 0:
            yield f"{key}.{name} is {getattr(section, name)}; it must be above 0"


def _at_most(key: str, section: Any, low: str, high: str) -> Iterator[str]:
    least, most = getattr(section, low), getattr(section, high)
    if not 0 <= least <= most:
        yield f"{key}.{low} is {least}; it must be between 0 and {key}.{high}, {most}"


def _expert_problems(key: str, expert: Expert, recipe: Recipe) -> Iterator[str]:
    name = key.removeprefix("reproduce.older.").removeprefix("experts.")
    if not re.fullmatch(DOMAIN_NAME, name):
        yield f"{key}: a name may hold letters, digits, '_', '-' and '.'"
    stages = {name: getattr(expert, name) for name in STAGES}
    yield from _positive(key, expert, ("weight",))
    if not any(stages.values()):
        yield f"{key}: an expert needs at least one stage of {', '.join(STAGES)}"
    for name, stage in stages.items():
        if stage is not None:
            yield from _stage_problems(f"{key}.{name}", stage, recipe, ROLES)
    if expert.rlvr is not None:
        yield from _rlvr_problems(f"{key}.rlvr", expert.rlvr, recipe)


def _stage_problems(key: str, stage: Stage, recipe: Recipe, roles: Sequence[str]) -> Iterator[str]:
    if not stage.data and key != "router":  # the router takes the experts' SFT data by default
        yield f"{key}.data: name at least one dataset, such as {key}.data.{_any(recipe.datasets)}=1"
    for name, share in stage.data.items():
        if name not in recipe.datasets:
            hint = nearest(name, list(recipe.datasets)) or "it is not under `datasets`"
            yield f"{key}.data: unknown dataset '{name}'; {hint}"
        if share <= 0:
            yield f"{key}.data.{name} is {share}; a share must be above 0"
    if stage.steps <= 0 and stage.epochs <= 0:
        yield f"{key}: either `steps` or `epochs` must be above 0"
    yield from _positive(key, stage, ("batch_size", "seq_len", "lr"))
    counts = ("num_workers", "threads", "micro_batch", "checkpoint_every", "keep_last", "together")
    yield from _positive(f"{key}.run", stage.run, counts)
    if not 0 <= stage.warmup <= 1:
        yield f"{key}.warmup is {stage.warmup}; it is a share of the steps, between 0 and 1"
    yield from _choice(f"{key}.schedule", stage.schedule, SCHEDULES)
    yield from _choice(f"{key}.dtype", stage.dtype, ("bfloat16", "float32"))
    yield from _choice(f"{key}.optimizer", stage.optimizer, ("adamw", "adamw_8bit"))
    if stage.optimizer == "adamw_8bit":
        needed = {"dtype": "bfloat16", "run.num_workers": 1, "run.zero_stage": 0}
        there = (stage.dtype, stage.run.num_workers, stage.run.zero_stage)
        for (name, value), found in zip(needed.items(), there, strict=True):
            if found != value:
                yield f"{key}.{name} is {found}; with optimizer adamw_8bit it must be {value}"
    yield from _choice(f"{key}.run.kernels", stage.run.kernels, ("auto", "reference"))
    yield from _learn_problems(key, stage.learn, roles)
    if stage.run.num_workers > stage.batch_size > 0:
        yield (
            f"{key}.run.num_workers is {stage.run.num_workers}; with a batch_size of "
            f"{stage.batch_size} the others would have nothing to do"
        )
    yield from _at_most(f"{key}.run", stage.run, "min_workers", "num_workers")
    # Engines are given tensors that one learner holds whole.
    most = 2 if isinstance(stage, Rlvr) else 3
    if not 0 <= stage.run.zero_stage <= most:
        yield f"{key}.run.zero_stage is {stage.run.zero_stage}; 0 to {most} are supported here"


def _dataset_problems(key: str, dataset: Dataset, recipe: Recipe) -> Iterator[str]:
    if not dataset.uri:
        yield f"{key}.uri is empty; give a file, a folder or hf://datasets/OWNER/NAME"
    if dataset.uri.startswith("tiny:") and recipe.tiny is None:
        yield f"{key}.uri is {dataset.uri}, and this recipe has no `tiny` section to make it"
    yield from _choice(f"{key}.faulty", dataset.faulty, ("refuse", "skip"))
    if dataset.convert and not re.fullmatch(r"[\w.]+:\w+", dataset.convert):
        yield f"{key}.convert is '{dataset.convert}'; write package.module:function"
    if dataset.limit < 0:
        yield f"{key}.limit is {dataset.limit}; it must be 0 or more"


def _evaluate_problems(settings: Evaluate) -> Iterator[str]:
    for stage in settings.stages:
        yield from _choice("evaluate.stages", stage, STAGES)
    yield from _choice("evaluate.unreachable", settings.unreachable, ("refuse", "skip"))
    yield from _positive("evaluate", settings, ("max_tokens", "num_engines"))
    if settings.harness and find_spec("lm_eval") is None:
        yield "evaluate.harness: lm-eval is not installed: pip install 'bar_ray[eval]'"
    names = [*settings.categories, *settings.harness]
    if not names:
        yield "evaluate.categories: at least one category with a test file is needed"
    for name in names:
        whole, _, part = name.partition("/")
        if names.count(name) > 1:
            yield f"evaluate.harness.{name} is a category of test files too: rename one of them"
        if part and whole in names:
            yield f"evaluate: {name} is of the set {whole}, which is a category itself"
        if OVERALL in (name, whole) or not re.fullmatch(r"[^/:]+(/[^/:]+)?", name):
            yield f"evaluate: '{name}' is no name for a category; write CATEGORY or SET/CATEGORY"


def _decontaminate_problems(settings: Decontaminate, recipe: Recipe) -> Iterator[str]:
    known = [*recipe.evaluate.categories]
    for name in settings.against:
        if name not in known:
            hint = nearest(name, known) or f"the categories are {', '.join(known)}"
            yield f"decontaminate.against: no category '{name}'; {hint}"
    yield from _positive("decontaminate", settings, ("ngram",))
    if not 0 <= settings.overlap < 1:
        yield f"decontaminate.overlap is {settings.overlap}; it must be from 0 to below 1"


def _learn_problems(key: str, learn: Learn, roles: Sequence[str]) -> Iterator[str]:
    rates = {role: getattr(learn, role) for role in ROLES}
    if not any(rates.values()):
        yield f"{key}.learn: everything is frozen; give at least one role a rate above 0"
    for role, rate in rates.items():
        if rate < 0:
            yield f"{key}.learn.{role} is {rate}; a learning-rate multiplier is 0 or more"
        if rate and role not in roles:
            yield f"{key}.learn.{role}: no {role} to unfreeze here, only {', '.join(roles)}"


def _rlvr_problems(key: str, rlvr: Rlvr, recipe: Recipe) -> Iterator[str]:
    rollout = rlvr.rollout
    names = ("max_tokens", "num_engines", "tensor_parallel", "threads", "max_num_seqs", "graders")
    yield from _positive(f"{key}.rollout", rollout, names)
    yield from _at_most(f"{key}.rollout", rollout, "min_engines", "num_engines")
    if rollout.max_tokens >= rlvr.seq_len:
        yield (
            f"{key}.rollout.max_tokens is {rollout.max_tokens}; with a prompt it must fit into "
            f"{key}.seq_len {rlvr.seq_len}"
        )
    is_part = rollout.tensor_parallel == 1 and 0 < rollout.gpus_per_engine < 1
    if not is_part and rollout.gpus_per_engine not in (0, rollout.tensor_parallel):
        yield (
            f"{key}.rollout.gpus_per_engine is {rollout.gpus_per_engine:g}; an engine takes as "
            f"many GPUs as {key}.rollout.tensor_parallel says: {rollout.tensor_parallel}, or a "
            "part of one"
        )
    if rlvr.rollout.top_p != 1:
        yield (
            f"{key}.rollout.top_p is {rlvr.rollout.top_p}; it must stay 1: truncated sampling "
            "makes the learner/engine importance ratio wrong"
        )
    if rlvr.rollout.temperature <= 0:
        yield f"{key}.rollout.temperature must be above 0: a group needs different samples"
    if rlvr.grpo.samples < 2:
        yield f"{key}.grpo.samples is {rlvr.grpo.samples}; a group needs at least 2 samples"
    for setting, valid in GRPO_CHOICES.items():
        yield from _choice(f"{key}.grpo.{setting}", getattr(rlvr.grpo, setting), valid)
    yield from _choice(f"{key}.keep", rlvr.keep, ("last", "best"))
    for setting in ("max_staleness", "refill"):
        if getattr(rlvr, setting) < 0:
            yield f"{key}.{setting} is {getattr(rlvr, setting)}; it must be 0 or more"
    if not 1 <= rlvr.grpo.minibatches <= rlvr.batch_size:
        yield (
            f"{key}.grpo.minibatches is {rlvr.grpo.minibatches}; it must be between 1 and "
            f"batch_size {rlvr.batch_size}"
        )
    if rlvr.held_out and rlvr.held_out not in recipe.datasets:
        hint = nearest(rlvr.held_out, list(recipe.datasets)) or "it is not under `datasets`"
        yield f"{key}.held_out: unknown dataset '{rlvr.held_out}'; {hint}"
    if rlvr.held_out and rlvr.held_out_every <= 0:
        yield f"{key}.held_out_every is {rlvr.held_out_every}; it must be above 0"
    if rlvr.keep == "best" and rlvr.replay:
        yield f"{key}.keep=best needs engines to score with, and {key}.replay has none"
    if rlvr.keep == "best" and not rlvr.held_out:
        yield f"{key}.keep=best needs {key}.held_out: the prompts that decide which is best"


def _router_problems(recipe: Recipe) -> Iterator[str]:
    router, num_experts = recipe.router, len(recipe.experts) + 1
    if not 0 < router.fraction <= 1:
        yield f"router.fraction is {router.fraction}; it must be above 0 and at most 1"
    if not 0 <= router.top_k <= num_experts:
        yield f"router.top_k is {router.top_k}; the merged model has {num_experts} experts"
    if not router.stratified and not router.natural:
        yield (
            "router.stratified=false samples all sources as one, so there are no shares to keep: "
            "set router.natural=true"
        )
    if router.top_k == 1:
        yield (
            "router.top_k is 1: with one active expert its gate is normalised away, so the router "
            "gets no gradient; use 2 or more"
        )
    yield from _stage_problems("router", router, recipe, ("router", "anchor"))
    sft_sources = {n for e in recipe.experts.values() if e.sft is not None for n in e.sft.data}
    if not sft_sources:
        yield "router: no expert has an `sft` stage, so there is no SFT data to sample from"


def _merge_problems(recipe: Recipe) -> Iterator[str]:
    merge = recipe.merge
    yield from _choice("merge.rule", merge.rule, MERGE_RULES)
    if merge.expert and merge.expert not in recipe.experts:
        hint = nearest(merge.expert, list(recipe.experts)) or "it is not under `experts`"
        yield f"merge.expert: no expert '{merge.expert}'; {hint}"
    if not 0 < merge.density <= 1:
        yield f"merge.density is {merge.density}; it must be above 0 and at most 1"
    yield from _positive("merge", merge, ("fisher_rows",))
    if merge.rule == "fisher":
        for name in [name for name, expert in recipe.experts.items() if expert.sft is None]:
            yield f"merge.rule=fisher: experts.{name} has no `sft` whose data could be asked"


def _reproduce_problems(recipe: Recipe) -> Iterator[str]:
    found, shared = recipe.reproduce, recipe.baselines.btx_shared
    for name in ("seeds", "fractions"):
        if not getattr(found, name):
            yield f"reproduce.{name} is empty; give at least one"
    for fraction in found.fractions:
        if not 0 < fraction <= 1:
            yield f"reproduce.fractions: {fraction} must be above 0 and at most 1"
    for share in found.shares:
        if not 0 <= share < 1:
            yield f"reproduce.shares: {share} must be from 0 to below 1"
    for name in ("router_steps", "token_steps"):
        for steps in getattr(found, name):
            if steps <= 0:
                yield f"reproduce.{name}: {steps} must be above 0"
    for key, names, known in (
        ("reproduce.mixed", found.mixed, [*recipe.experts]),
        ("reproduce.reinforced", found.reinforced, [*recipe.experts]),
        ("reproduce.kept", found.kept, [*recipe.experts]),
        ("reproduce.older", [*found.older], [*recipe.experts]),
        ("reproduce.rare", [*found.rare.values()], [*recipe.datasets]),
        ("baselines.btx_shared", [shared] if shared else [], [*recipe.experts]),
    ):
        for name in names:
            if name not in known:
                yield f"{key}: no '{name}' in this recipe; {nearest(name, known)}"
    for name, expert in found.older.items():
        yield from _expert_problems(f"reproduce.older.{name}", expert, recipe)


def _sweep_problems(recipe: Recipe) -> Iterator[str]:
    yield from _positive("sweep", recipe.sweep, ("trials", "concurrent"))
    if recipe.sweep.reduction < 2:
        yield f"sweep.reduction is {recipe.sweep.reduction}; it must be at least 2"
    for key, how in recipe.sweep.space.items():
        if len(how) != 1:
            yield f"sweep.space.{key}: give one of {', '.join(SPACES)} with its values"
        for kind, values in how.items():
            yield from _choice(f"sweep.space.{key}", kind, SPACES)
            if kind != "choice" and not (len(values) == 2 and values[0] < values[1]):
                yield f"sweep.space.{key}.{kind} must be [low, high], not {values}"


def require_categories(recipe: Recipe, names: Sequence[str], why: str) -> None:
    """Refuse a recipe that does not score what something else is judged by."""
    known = [*recipe.evaluate.categories, *recipe.evaluate.harness]
    if lacking := [name for name in names if name not in (*known, *sets(known))]:
        raise UserError(f"evaluate.categories: {why}; {', '.join(lacking)} is missing")


def _choice(key: str, value: str, valid: Sequence[str]) -> Iterator[str]:
    if value not in valid:
        yield f"{key} is '{value}'; it must be one of {', '.join(valid)}. {nearest(value, valid)}"


def _any(names: dict[str, Any]) -> str:
    return next(iter(names), "NAME")
