"""Reading a recipe: YAML, `key=value` overrides, checks, and the command line of every job.

Nothing here imports torch or ray: `--help` and a wrong key answer at once. Every mistake is a
`UserError` of one or two lines that names the key and the nearest valid one.
"""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from bar_ray.recipe import (
    ROLES,
    SHARED,
    STAGES,
    Dataset,
    Decontaminate,
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
SPACES = ("choice", "uniform", "loguniform")
DENSE_ROLES = (*SHARED, "expert")


def load(path: str, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from YAML, apply `key=value` overrides, check it."""
    raw = _read_recipe(Path(path))
    known_experts = tuple(raw["experts"])
    try:
        merged = _over(raw, _dotlist(overrides))
        _refuse_new_experts(merged, known_experts, path)
        _drop_experts(merged)
        _apply_stage_defaults(merged)
        recipe = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Recipe), merged))
    except (OmegaConfBaseException, yaml.YAMLError, ValueError, TypeError) as error:
        raise UserError(_one_line(error, path)) from error
    check(recipe)
    return recipe


def raw(path: str) -> str:
    """A recipe's file with all it extends and includes, before any override, as YAML."""
    return yaml.safe_dump(_read_recipe(Path(path)))


def dump(recipe: Recipe) -> str:
    """The resolved recipe as YAML that `load` accepts."""
    return OmegaConf.to_yaml(OmegaConf.structured(recipe))


def _read_recipe(path: Path, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A recipe's file with its experts' files, on top of the recipe it `extends`, if any."""
    if path.resolve() in above:
        raise UserError(f"{path}: `extends` comes back to itself")
    raw = _read_yaml(path)
    raw["experts"] = _include_experts(raw.get("experts") or {}, path)
    raw["datasets"] = _named_uris(raw.get("datasets") or {})
    parent = raw.pop("extends", None)
    if parent is None:
        return raw
    below = _read_recipe(path.parent / str(parent), (*above, path.resolve()))
    merged = OmegaConf.to_container(OmegaConf.merge(below, raw))
    return {str(key): value for key, value in merged.items()}


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read the config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict):
        raise UserError(f"{path} must hold keys and values at its top level (see --help)")
    return raw


def _include_experts(experts: Any, path: Path) -> dict[str, Any]:
    """An expert given as a string is a YAML file beside the recipe."""
    if not isinstance(experts, dict):
        raise UserError(f"{path}: experts: must be names with their stages, not {experts!r:.60}")
    return {
        name: _read_yaml(path.parent / expert) if isinstance(expert, str) else expert
        for name, expert in experts.items()
    }


def _named_uris(datasets: Any) -> dict[str, Any]:
    """A dataset given as a string is its URI."""
    if not isinstance(datasets, dict):
        raise UserError(f"datasets: must be names with their URIs, not {datasets!r:.60}")
    return {
        name: {"uri": dataset} if isinstance(dataset, str) else dataset
        for name, dataset in datasets.items()
    }


def _dotlist(overrides: Sequence[str]) -> Any:
    for item in overrides:
        if "=" not in item:
            raise UserError(f"'{item}' is not an override: write key=value, such as seed=1")
    uri = r"^(datasets\.[^.=]+)=(?!\{)"
    return OmegaConf.from_dotlist([re.sub(uri, r"\1.uri=", item) for item in overrides])


def _refuse_new_experts(merged: Any, known: tuple[str, ...], path: str) -> None:
    for key in ("experts", "stages"):
        if key in merged and not isinstance(merged[key], DictConfig):
            raise UserError(f"{key}: must be names with their settings, not {merged[key]!r:.60}")
    for name, expert in merged.experts.items():
        if not isinstance(expert, DictConfig | None):
            raise UserError(f"experts.{name}: must be stages with settings, not {expert!r:.60}")
        for stage, settings in (expert or {}).items():
            if stage in STAGES and not isinstance(settings, DictConfig | None):
                raise UserError(f"experts.{name}.{stage}: must be settings, not {settings!r:.60}")
        if name not in known:
            hint = nearest(name, known) or f"the experts are {', '.join(known)}"
            raise UserError(f"experts.{name}: {path} has no expert '{name}'; {hint}")


def _over(below: Any, above: Any) -> Any:
    """Overrides on top of a recipe.

    An expert that they leave out takes the sources that only it had from the router: of data that
    no expert knows, the router learns to spoil what they do.
    """
    below = OmegaConf.create(below)
    merged = OmegaConf.merge(below, above)
    before, after = _sources(below), _sources(merged)
    data = _at(merged, "router", "data")
    for name in (before - after) & {*(data if isinstance(data, DictConfig) else ())}:
        del data[name]
    return merged


def _sources(recipe: Any) -> set[str]:
    """The SFT sources of all experts that are not left out."""
    experts = _at(recipe, "experts")
    names = [*experts] if isinstance(experts, DictConfig) else []
    places = [("experts", name) for name in names] + [("stages",)]
    found = [_at(recipe, *place, "sft", "data") for place in places]
    return {name for data in found if isinstance(data, DictConfig) for name in data}


def _at(node: Any, *keys: str) -> Any:
    """What stands there, None where nothing does; mistakes are found when types are checked."""
    for key in keys:
        node = node.get(key) if isinstance(node, DictConfig) else None
    return node


def _drop_experts(merged: Any) -> None:
    """`experts.code=null` leaves an expert out."""
    for experts in (merged.experts, _older(merged)):
        for name in [name for name, expert in experts.items() if expert is None]:
            del experts[name]


def _older(merged: Any) -> Any:
    return (merged.get("reproduce") or {}).get("older") or {}


def _apply_stage_defaults(merged: Any) -> None:
    """`stages.sft` is where every expert's `sft` starts from."""
    defaults = merged.get("stages") or {}
    for expert in (*merged.experts.values(), *_older(merged).values()):
        for stage in STAGES:
            if expert.get(stage) is not None and defaults.get(stage) is not None:
                expert[stage] = OmegaConf.merge(defaults[stage], expert[stage])


def _one_line(error: Exception, path: str) -> str:
    key = getattr(error, "full_key", None)
    whole = isinstance(error, yaml.YAMLError)  # says where on its later lines
    reason = " ".join(str(error).split()) if whole else str(error).splitlines()[0]
    return f"{path}: {key}: {reason}" if key else f"{path}: {reason}"


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


# --- combinations that cannot work ---------------------------------------------------------------


def check(recipe: Recipe) -> None:
    """Refuse impossible combinations before anything starts."""
    for problem in _problems(recipe):
        raise UserError(problem)


def _problems(recipe: Recipe) -> Iterator[str]:
    if not recipe.experts:
        yield "experts: at least one expert is needed"
    for name, dataset in recipe.datasets.items():
        yield from _dataset_problems(f"datasets.{name}", dataset, recipe)
    if recipe.decontaminate is not None:
        yield from _decontaminate_problems(recipe.decontaminate, recipe)
    if recipe.tiny is None and not recipe.base.post_trained:
        yield "base.post_trained: give the dense checkpoint to branch from, or a `tiny` section"
    if recipe.tiny is not None:
        yield from _stage_problems("tiny.pretrain", recipe.tiny.pretrain, recipe, DENSE_ROLES)
        yield from _stage_problems("tiny.post_train", recipe.tiny.post_train, recipe, DENSE_ROLES)
    for stage in recipe.evaluate.stages:
        yield from _choice("evaluate.stages", stage, STAGES)
    for name, expert in recipe.experts.items():
        yield from _expert_problems(f"experts.{name}", expert, recipe)
    yield from _merge_problems(recipe)
    yield from _reproduce_problems(recipe)
    yield from _sweep_problems(recipe)
    yield from _router_problems(recipe)
    yield from _positive("evaluate", recipe.evaluate, ("max_tokens", "num_engines"))
    if not recipe.evaluate.categories:
        yield "evaluate.categories: at least one category with a test file is needed"


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
    if dataset.limit < 0:
        yield f"{key}.limit is {dataset.limit}; it must be 0 or more"


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
    if rollout.gpus_per_engine not in (0, rollout.tensor_parallel):
        yield (
            f"{key}.rollout.gpus_per_engine is {rollout.gpus_per_engine:g}; an engine takes as "
            f"many GPUs as {key}.rollout.tensor_parallel says: {rollout.tensor_parallel}"
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
            "router.top_k is 1: with one active expert its gate is normalised away (post-norm "
            "blocks), so the router gets no gradient; use 2 or more"
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
    if lacking := [name for name in names if name not in recipe.evaluate.categories]:
        raise UserError(f"evaluate.categories: {why}; {', '.join(lacking)} is missing")


def _choice(key: str, value: str, valid: Sequence[str]) -> Iterator[str]:
    if value not in valid:
        yield f"{key} is '{value}'; it must be one of {', '.join(valid)}. {nearest(value, valid)}"


def _any(names: dict[str, Any]) -> str:
    return next(iter(names), "NAME")


# --- the command line ----------------------------------------------------------------------------


class Cli:
    """`python jobs/JOB.py conf/RECIPE.yaml [--flag] [key=value ...]` for every job."""

    def __init__(self, doc: str) -> None:
        self.parser = argparse.ArgumentParser(
            description=doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            epilog="settings (key=value on the command line or in YAML):\n" + reference(),
        )
        self.parser.add_argument("recipe", help="YAML file, such as conf/tiny.yaml")
        self.parser.add_argument("overrides", nargs="*", metavar="key=value", help="override")
        self.parser.add_argument(
            "--plan", action="store_true", help="say what would run or be reused, and stop"
        )

    def add(self, *names: str, **options: Any) -> "Cli":
        self.parser.add_argument(*names, **options)
        return self

    def run(self, main: Callable[[Recipe, argparse.Namespace], None]) -> None:
        """Parse, load, call `main`; a `UserError` is one message and exit code 2."""
        args = self.parser.parse_intermixed_args()
        try:
            main(load(args.recipe, args.overrides), args)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(2)
        except KeyboardInterrupt:
            print("interrupted; the same command continues from here", file=sys.stderr)
            sys.exit(130)


def reference(section: Any = None, prefix: str = "") -> str:
    """Every key with its default and meaning, one line each."""
    section, lines = section or Recipe(), []
    for setting in fields(section):
        key, default = prefix + setting.name, getattr(section, setting.name)
        inner = default if is_dataclass(default) else _optional_dataclass(setting.type)
        if inner is None:
            shown = "{}" if default == {} else repr(default)
            lines.append(f"  {key} = {shown}  # {setting.metadata['doc']}")
        else:
            many = ".NAME" if default == {} else ""
            lines.append(f"  {key}{many}:  # {setting.metadata['doc']}")
            lines.append(reference(inner, f"{key}{many}."))
    return "\n".join(lines)


def _optional_dataclass(annotation: Any) -> Any:
    """The dataclass inside `X | None` or `dict[str, X]`, with its defaults; None when none is."""
    inner = [a for a in getattr(annotation, "__args__", ()) if is_dataclass(a)]
    return inner[0]() if inner else None
