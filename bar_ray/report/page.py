"""What the page shows: each section as plain values for `page.html.j2`.

A section whose source is missing (nothing scored yet, no RLVR, a run that only reused) is empty,
and the template says so in a sentence.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from bar_ray import config, storage
from bar_ray.graph import Step, topological
from bar_ray.log import duration, without_keys
from bar_ray.pipeline import Pipeline
from bar_ray.recipe import Recipe
from bar_ray.report import history, scores, svg
from bar_ray.report.history import History, Record, Span, identity

# Light and dark value of each domain's colour, in the order of the recipe.
COLOURS = (
    ("#2f6fbf", "#74acf0"),
    ("#c9651b", "#f2a25c"),
    ("#22825c", "#5fc79c"),
    ("#a8408f", "#e18fcd"),
    ("#85691a", "#cfb45f"),
    ("#2c8a9c", "#79cfe0"),
    ("#b83c35", "#f08d85"),
    ("#6354c4", "#a99fff"),
)
OTHERS = {"base": "var(--base)", "pretrained": "var(--pretrained)", "anchor": "var(--base)"}
TRAINED = {
    **{"train": "Dense base", "midtrain": "Mid-training", "sft": "SFT"},
    **{"rlvr": "RLVR", "route": "Router"},
}
MAIN_METRICS = ("reward", "loss")
NOT_METRICS = ("time", "step", "steps", "eta_s", "held_out")
WORDS = {
    "loss": "loss, nats per token",
    "reward": "mean reward, 0 to 1",
    "gap": "learner/engine log-prob gap, nats",
    "entropy": "entropy, nats per token",
    "kl": "KL to the model the stage began with, nats per token",
    "importance": "importance weight, mean",
    "importance_max": "importance weight, largest",
    "importance_capped": "importance weights capped, share",
    "ratio_clipped": "tokens with a clipped ratio, share",
    "staleness": "staleness of rollouts, optimizer steps",
    "staleness_max": "staleness of rollouts, most",
    "versions_mixed": "completions by more than one version, share",
    "zero_variance": "groups without signal, share",
    "truncated": "completions cut, share",
    "length": "completion length, tokens",
    "sync_s": "time of a weight push, s",
    "sync_mb": "size of a weight push, MB",
    "canary_gap": "learner/engine gap after a push, nats",
    "rollout_wait_s": "learner waits for rollouts, s",
    "train_s": "learner computes, s",
    "generate_s": "engines generate, s",
    "engines_idle": "engines idle, share of the time",
    "rollout_tokens": "tokens generated",
    "requeued": "prompts sampled again, so far",
    "ahead": "prompts sampled ahead",
    "engines_lost": "engines replaced, so far",
    "graders_lost": "graders replaced, so far",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_s": "tokens per second",
    "tflops": "training, TFLOP/s of all workers",
    "mfu": "share of the devices' peak FLOP/s",
    "seconds": "time of a step, s",
}


def render(pipeline: Pipeline, recipe: Recipe, run_id: str, models: scores.Models) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"duration": duration, "title_of": title_of}
    page = Page(pipeline, recipe, run_id, models)
    return environment.get_template("page.html.j2").render(page=page, glyph=svg.glyph)


def title_of(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S %Z")


@dataclass(frozen=True)
class StepRow:
    """One step of the plan: did it run, how long did it take, in which run."""

    step: Step
    status: str
    reason: str
    seconds: float | None
    run: str


class Page:
    """Everything the template asks for."""

    def __init__(
        self, pipeline: Pipeline, recipe: Recipe, run_id: str, models: scores.Models
    ) -> None:
        self.pipeline, self.recipe, self.run_id, self.models = pipeline, recipe, run_id, models
        self.domains = list(pipeline.stages)
        self.steps = topological(pipeline.targets)
        self.history: History = history.read(recipe.storage, self.steps, run_id)
        self.description = history.run_description(recipe.storage, run_id)
        self.events = self.history.of_run(run_id)
        self.spans: list[Span] = history.spans(self.events)
        self.settings = without_keys(config.dump(recipe))

    # ---- colours

    def colour(self, name: str) -> str:
        if name in self.domains:
            place = self.domains.index(name)
            near = place < len(COLOURS)
            return f"var(--d{place})" if near else f"hsl({137 * place % 360} 50% 52%)"
        return OTHERS.get(name, "var(--ink)" if name in scores.LAST else "var(--base)")

    def css_colours(self, dark: bool) -> Markup:
        values = [pair[dark] for pair in COLOURS]
        return Markup(" ".join(f"--d{i}: {value};" for i, value in enumerate(values)))

    # ---- scores

    @property
    def categories(self) -> list[str]:
        return scores.categories(self.models)

    @property
    def order(self) -> list[str]:
        return scores.ordered(self.models)

    @property
    def retention(self) -> dict[str, float]:
        return scores.retention(self.models)

    @property
    def mean_retention(self) -> float | None:
        return scores.mean(self.retention)

    def gains(self, name: str) -> dict[str, float]:
        return scores.gains(self.models, name)

    def domain_of(self, name: str) -> str:
        return scores.domain_of(name)

    def stage_of(self, name: str) -> str:
        return scores.stage_of(name)

    def ladder(self) -> Markup:
        """Per category: base, its own expert's stages (paler is earlier), merged, bar."""
        rungs = []
        for category in self.categories:
            own = [n for n in self.order if scores.domain_of(n) == category]
            marks = []
            for name in self.order:
                if category not in self.models[name]:
                    continue
                score = self.models[name][category]
                if name in own:
                    shade = (own.index(name) + 1) / len(own)
                    marks.append((name, score, "dot", self.colour(category), 0.25 + 0.75 * shade))
                elif not scores.domain_of(name):
                    shape = {"base": "ring", "merged": "cross", "bar": "diamond"}.get(name, "ring")
                    marks.append((name, score, shape, self.colour(name), 1.0))
            if marks:
                rungs.append(svg.Rung(category, marks))
        return svg.ladder(rungs) if rungs else Markup("")

    # ---- curves

    def trained(self, verb: str) -> list[tuple[Step, list[Record]]]:
        """The steps of a verb with the rows recorded while they were trained."""
        found = [
            (s, self.history.metrics.get(identity(s), [])) for s in self.steps if s.verb == verb
        ]
        return [(step, rows) for step, rows in found if rows]

    def curves(self) -> list[tuple[str, list[Markup], list[Markup]]]:
        """(stage, reward and loss, every other metric) of each stage that has curves."""
        sections = []
        for verb, title in TRAINED.items():
            steps = self.trained(verb)
            names = list(dict.fromkeys(k for _, rows in steps for row in rows for k in row))
            main = [self._chart(verb, key, steps) for key in MAIN_METRICS if key in names]
            main.insert(1, self._held_out_chart(steps))
            rest = [n for n in names if n not in (*MAIN_METRICS, *NOT_METRICS)]
            others = [self._chart(verb, key, steps) for key in rest]
            if steps:
                sections.append((title, [c for c in main if c], [c for c in others if c]))
        return sections

    def _chart(self, verb: str, key: str, steps: list[tuple[Step, list[Record]]]) -> Markup:
        points = {step.name: _points(rows, key) for step, rows in steps}
        words = "policy loss" if (verb, key) == ("rlvr", "loss") else WORDS.get(key, "")
        words = words or (f"{key.removesuffix('_s')}, s" if key.endswith("_s") else key)
        return self._lines(points, words, shown=(0.0, 1.0) if key == "reward" else ())

    def _held_out_chart(self, steps: list[tuple[Step, list[Record]]]) -> Markup:
        points = {step.name: self.history.held_out(step) for step, _ in steps}
        return self._lines(points, "held-out score, 0 to 1", shown=(0.0, 1.0))

    def _lines(
        self, points: dict[str, list[tuple[float, float]]], words: str, shown: tuple[float, ...]
    ) -> Markup:
        lines = [svg.Line(name, self.colour(name), found) for name, found in points.items()]
        some = [line for line in lines if line.points]
        return svg.line_chart(some, "optimizer step", words, shown) if some else Markup("")

    def without_curves(self) -> list[str]:
        """Trained steps of which nothing was recorded."""
        steps = [s for s in self.steps if s.verb in TRAINED]
        return [s.label for s in steps if not self.history.metrics.get(identity(s))]

    # ---- router

    def router_load(self) -> dict[str, list[list[float]]]:
        return scores.read_from_artifact(self.pipeline.bar.artifact, "router_load.json") or {}

    def slots(self) -> list[str]:
        merged = storage.read_manifest(self.pipeline.merged.artifact.uri)
        return (merged.info.get("slots") if merged else None) or ["anchor", *self.domains]

    def own_slot(self, source: str) -> str:
        """The expert a source belongs to: the only one that was finetuned on it."""
        experts = self.recipe.experts.items()
        users = [name for name, e in experts if e.sft is not None and source in e.sft.data]
        return users[0] if len(users) == 1 else ""

    # ---- the run

    @property
    def wall(self) -> float:
        times = [event["time"] for event in self.events]
        return max(times) - min([self.description.get("started", math.inf), *times]) if times else 0

    def resource_hours(self) -> dict[str, float]:
        return history.resource_hours(self.spans)

    @property
    def begin(self) -> float:
        """When the time axis of the run starts; epoch seconds."""
        return min([self.description.get("started", math.inf), *(s.ready for s in self.spans)])

    def timeline(self) -> Markup:
        begin = self.begin
        lanes: dict[str, list[svg.Bar]] = {n: [] for n in ("data", "base", *self.domains, "model")}
        owners = self._owners()
        for span in self.spans:
            verb, name, _ = span.who
            lane = owners.get(span.who, "data")
            waited = f", after waiting {duration(span.started - span.ready)}"
            title = f"{verb} {name}: {duration(span.ended - span.started)}"
            title += waited if span.started - span.ready >= 1 else ""
            times = (span.ready - begin, span.started - begin, span.ended - begin)
            colour = self.colour("bar" if lane == "model" else lane)
            bar = svg.Bar(
                verb, title, colour, *times, verb == "evaluate", span.outcome != "finished"
            )
            lanes[lane].append(bar)
        lanes["data"] = svg.joined(lanes["data"], "data steps")
        used = [(name, bars) for name, bars in lanes.items() if bars]
        return svg.timeline(used, self.wall) if used else Markup("")

    def occupancy(self) -> Markup:
        """What each expert held of the pool over time: its GPUs, or its CPUs where there are none.

        Empty for a run in which nothing trained.
        """
        hours = self.resource_hours()
        kind, begin = "GPU" if hours.get("GPU") else "CPU", self.begin
        owners = self._owners()
        lanes: dict[str, list[svg.Block]] = {n: [] for n in ("base", *self.domains, "model")}
        for span in self.spans:
            if span.who in owners:
                held = ((at - begin, end - begin, n) for at, end, n in span.held(kind))
                lanes[owners[span.who]] += [svg.Block(*each) for each in held]
        used = [
            (name, self.colour("bar" if name == "model" else name), blocks)
            for name, blocks in lanes.items()
            if blocks
        ]
        return svg.stacked(used, self.wall, f"{kind}s held") if used else Markup("")

    def _owners(self) -> dict[history.Who, str]:
        """The lane of each step: its expert, the dense base, or the merged model."""
        owners = {}
        for step in self.steps:
            if step.verb in ("init", "train", "import", "branch"):
                owners[identity(step)] = "base"
            elif step.verb in ("merge", "route"):
                owners[identity(step)] = "model"
        for domain, stages in self.pipeline.stages.items():
            owners |= {identity(step): domain for step in stages.values()}
        for name, step in self.pipeline.scores.items():
            last = "model" if name in scores.LAST else "base"
            owners[identity(step)] = scores.domain_of(name) or last
        return owners

    def step_rows(self) -> list[StepRow]:
        plan = {history.who(entry): entry for entry in self.description.get("plan", [])}
        outcomes = {span.who: span.outcome for span in self.spans}
        made = self.history.made_by()
        rows = []
        for step in self.steps:
            me = identity(step)
            entry, finished = plan.get(me, {}), made.get(me, {})
            ran = outcomes.get(me, "not started" if entry.get("reused") is False else "reused")
            status = "ran" if ran == "finished" else ran
            seconds, run = finished.get("seconds"), finished.get("run", "")
            rows.append(StepRow(step, status, entry.get("reason", ""), seconds, run))
        return rows

    def incidents(self) -> list[tuple[Record, str]]:
        """Resumes, faults and failures of these steps in any run, with their details in words."""
        known = ("time", "event", "verb", "name", "fingerprint", "run")
        return [
            (e, ", ".join(f"{k} {_word(v)}" for k, v in e.items() if k not in known))
            for e in self.history.incidents()
        ]


def _points(rows: Sequence[Record], key: str) -> list[tuple[float, float]]:
    """(step, value) where the value is a finite number."""
    numbers = [(row["step"], row.get(key)) for row in rows]
    plain = [(s, v) for s, v in numbers if isinstance(v, int | float) and not isinstance(v, bool)]
    return [(step, float(value)) for step, value in plain if math.isfinite(value)]


def _word(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
