"""Sweeps with Ray Tune: trials are recipes with other settings, judged stage by stage.

A trial trains what its settings change; everything else is there, made by the recipe itself or by
another trial. It is judged three times: after SFT and after the last stage by the mean of the
experts' own categories, and last by the routed model's overall score. After the first two, ASHA
(Li et al. 2020) stops those that are behind.
"""

import hashlib
import io
import json
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from bar_ray import config, pipeline, storage, validate
from bar_ray.builder import Builder
from bar_ray.cluster import session
from bar_ray.cluster.lease import Busy
from bar_ray.cluster.sharing import PoolClient
from bar_ray.graph import Step, topological
from bar_ray.pipeline import Pipeline
from bar_ray.recipe import Recipe, Sweep, meaning
from bar_ray.report import collect
from bar_ray.types import UserError

RUNGS = ("after SFT", "experts", "routed model")
COMMON = ("world", "init", "import", "train", "branch", "tokenise")
WAIT_S = 5.0
DARK, APART, LABELS = 0.85, 0.08, 12  # of the picture: colours end before what white swallows


@dataclass(frozen=True)
class Trial:
    """What came of one trial: how far it got, and the last score of it."""

    settings: dict[str, Any]
    rung: int
    score: float
    error: str = ""


@dataclass(frozen=True)
class Source:
    """What a recipe is read from: a trial is the same text with more overrides.

    `text` is the whole recipe file with what it extends, as trials may run where no file of the
    driver's machine is; `overrides` hold the absolute storage.
    """

    text: str
    overrides: tuple[str, ...] = ()

    @classmethod
    def of(cls, path: str, overrides: Sequence[str], recipe: Recipe) -> "Source":
        return cls(config.raw(path), (*overrides, f"storage={recipe.storage}"))

    def recipe(self, settings: Mapping[str, Any]) -> Recipe:
        """The recipe with a trial's settings."""
        chosen = [f"{key}={value}" for key, value in settings.items()]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "recipe.yaml")
            path.write_text(self.text)
            return config.load(str(path), [*self.overrides, *chosen])


def space(sweep: Sweep) -> dict[str, Any]:
    """As Ray Tune draws from it."""
    found = {}
    for key, how in sweep.space.items():
        [(kind, values)] = how.items()
        found[key] = tune.choice(values) if kind == "choice" else getattr(tune, kind)(*values)
    if not found:
        raise UserError("sweep.space names no setting to vary (see conf/sweeps/)")
    return found


def check(recipe: Recipe) -> None:
    """Refuse a recipe whose trials could not be judged."""
    why = "a sweep judges each expert by the category of its name"
    validate.require_categories(recipe, [*recipe.experts], why)


# --- one trial ------------------------------------------------------------------------------------


def rungs(graph: Pipeline, recipe: Recipe) -> Iterator[dict[str, Step]]:
    """The models that each judgement scores, by the category or `overall` that counts."""
    steps = Builder(recipe)
    steps.dense()

    def scored(models: Mapping[str, Step]) -> dict[str, Step]:
        return {domain: steps.evaluate(f"{domain} {m.verb}", m) for domain, m in models.items()}

    yield scored(
        {d: stages.get("sft", [*stages.values()][-1]) for d, stages in graph.stages.items()}
    )
    yield scored(graph.experts)
    yield {"overall": graph.scores["bar"]}


def trial(settings: dict[str, Any], source: Source) -> None:
    """One trial, as Ray Tune runs it.

    `budget` is the time that ASHA sees: its cuts lie a factor of `reduction` apart, ours one
    judgement.
    """
    recipe = source.recipe(settings)
    graph = pipeline.build(recipe)
    for number, judged in enumerate(rungs(graph, recipe)):
        run_when_free(recipe, list(judged.values()))
        scores = collect(judged)["models"]
        score = fmean(scores[name][name] for name in judged)
        budget = recipe.sweep.reduction**number
        tune.report({"score": score, "rung": number + 1, "budget": budget})


def run_when_free(recipe: Recipe, targets: Sequence[Step]) -> None:
    """Run the targets; another trial may be making some of what they need."""
    while True:
        try:
            return session.run_here(recipe, targets)
        except Busy:
            time.sleep(WAIT_S)


# --- the sweep ------------------------------------------------------------------------------------


def prepare(recipe: Recipe) -> list[Step]:
    """What hardly a trial changes, to be made once before they start."""
    graph = pipeline.build(recipe)
    return [step for step in topological(graph.targets) if step.verb in COMMON]


def folder_of(source: Source, sweep: Sweep, recipe: Recipe, name: str) -> str:
    """Where a sweep's results go; another one when anything that decides them has changed."""
    described = [source.recipe({}), sweep.space, sweep.trials, sweep.reduction, sweep.seed]
    evaluated = [step.fingerprint for step in pipeline.build(recipe).targets]
    text = json.dumps([meaning(described[0]), *described[1:], evaluated], default=str)
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return storage.join(recipe.storage, "sweeps", f"{name}-{digest}")


def run(source: Source, sweep: Sweep, root: str) -> list[Trial]:
    """All trials, the best first; continues where an earlier run of the same sweep ended."""
    filesystem, path = storage.resolve(root)
    here = f"node:{ray.util.get_node_ip_address()}"  # trials direct others: never on a spot node
    bundle = tune.PlacementGroupFactory([{"CPU": 0.0, here: 0.001}])
    trainable = tune.with_resources(tune.with_parameters(trial, source=source), bundle)
    parent, _, name = path.rpartition("/")
    pool = PoolClient(create=True)  # one for all trials: it ends with the handle of who made it
    pool.ask("view")
    if tune.Tuner.can_restore(path, storage_filesystem=filesystem):
        tuner = tune.Tuner.restore(
            path,
            trainable=trainable,
            storage_filesystem=filesystem,
            resume_unfinished=True,
            restart_errored=True,
        )
    else:
        tuner = tune.Tuner(
            trainable,
            param_space=space(sweep),
            tune_config=tune.TuneConfig(
                metric="score",
                mode="max",
                num_samples=sweep.trials,
                search_alg=BasicVariantGenerator(
                    random_state=sweep.seed, max_concurrent=sweep.concurrent
                ),
                scheduler=ASHAScheduler(
                    time_attr="budget",
                    max_t=sweep.reduction ** (len(RUNGS) - 1),
                    grace_period=1,
                    reduction_factor=sweep.reduction,
                ),
            ),
            run_config=tune.RunConfig(
                name=name, storage_path=parent, storage_filesystem=filesystem, verbose=1
            ),
        )
    results = tuner.fit()
    trials = [
        Trial(
            dict(result.config),
            (result.metrics or {}).get("rung", 0),
            (result.metrics or {}).get("score", 0.0),
            str(result.error).strip().splitlines()[-1] if result.error else "",
        )
        for result in results
    ]
    if not any(each.rung for each in trials):
        raise UserError(f"every trial failed, the first with: {trials[0].error}")
    return sorted(trials, key=lambda each: (-each.rung, -each.score))


def write(source: Source, trials: Sequence[Trial], root: str) -> None:
    """`trials.json`, `sweep.svg`, and `best.yaml`, which train_all accepts."""
    best = source.recipe(trials[0].settings)
    files = {
        "trials.json": json.dumps([asdict(trial) for trial in trials], indent=1),
        "best.yaml": config.dump(best),
    }
    for name, text in files.items():
        storage.write_bytes(storage.join(root, name), text.encode())
    storage.write_bytes(storage.join(root, "sweep.svg"), picture(trials))


def picture(trials: Sequence[Trial]) -> bytes:
    """Parallel coordinates: a line per trial over its settings and its rank, as SVG.

    Rank and not score, as one trial that failed to learn would press all others together.
    """
    import matplotlib
    from matplotlib.figure import Figure

    ranked = [each for each in trials if not each.error]
    axes_of = [*trials[0].settings, "rank: score"]
    columns = [_scaled([each.settings[name] for each in ranked]) for name in trials[0].settings]
    columns.append(_ranks(ranked))
    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": "bar_ray"}):
        figure, file = (
            Figure(figsize=(1.6 * len(axes_of) + 1, 4), layout="constrained"),
            io.BytesIO(),
        )
        axes = figure.subplots()
        colours = matplotlib.colormaps["plasma"]
        for number, trial in enumerate(ranked):
            apart = APART * (columns[-1][0][number] - 0.5)  # equal settings lie beside each other
            ys = [column[0][number] + apart for column in columns[:-1]] + [columns[-1][0][number]]
            done = trial.rung == len(RUNGS)
            style = {"lw": 2 if done else 1.2, "ls": "-" if done else "--"}
            colour = colours(DARK * (1 - ys[-1]))
            axes.plot(range(len(ys)), ys, color=colour, alpha=0.85, **style)
        for place, (_, labels) in enumerate(columns):
            axes.axvline(place, color="#888", lw=0.8)
            for height, label in labels.items():
                axes.text(place + 0.03, height, label, fontsize=7, va="center")
        names = [name.replace(".", ".\n", 1).replace(".learn.", ".\nlearn.") for name in axes_of]
        axes.set_xticks(range(len(axes_of)), names, fontsize=7)
        axes.set_yticks([])
        axes.set_title("trials, the best on top and darkest; dashed: stopped early", fontsize=8)
        for side in axes.spines.values():
            side.set_visible(False)
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()


def _ranks(ranked: Sequence[Trial]) -> tuple[list[float], dict[float, str]]:
    """The best at 1, and what to write beside some."""
    last = max(1, len(ranked) - 1)
    heights = [1 - place / last for place in range(len(ranked))]
    every = math.ceil(len(ranked) / LABELS)
    named = list(enumerate(ranked))[::every]
    return heights, {heights[n]: f"{n + 1}: {trial.score:.1f}" for n, trial in named}


def _scaled(values: Sequence[Any]) -> tuple[list[float], dict[float, str]]:
    """Values on 0 to 1, and what to write at which height; few distinct ones are set evenly."""
    named = any(isinstance(value, str | bool) for value in values)
    known = sorted(set(values), key=str if named else float)
    if named or len(known) <= 5:
        place = {v: n / max(1, len(known) - 1) for n, v in enumerate(known)}
        return [place[v] for v in values], {place[v]: shown(v) for v in known}
    low, high = known[0], known[-1]
    is_wide = low > 0 and high / low > 20
    scale = math.log if is_wide else float
    span = scale(high) - scale(low)
    return [(scale(v) - scale(low)) / span for v in values], {0.0: f"{low:.3g}", 1.0: f"{high:.3g}"}


def shown(value: Any) -> str:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return f"{value:.3g}" if is_number else str(value)


def table(trials: Sequence[Trial]) -> str:
    """One line a trial, the best first."""
    lines = []
    for place, each in enumerate(trials, start=1):
        settings = "  ".join(f"{key}={shown(value)}" for key, value in each.settings.items())
        judged = each.error or f"{each.score:5.1f} {RUNGS[each.rung - 1]}"
        lines.append(f"{place:>3}  {judged:<20}  {settings}")
    return "\n".join(lines)
