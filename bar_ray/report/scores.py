"""The score table: which models there are, in which order, what was gained and what was kept.

Everything is derived from the names of `pipeline.scores` ("base", "math sft", "merged", "bar"), so
a `scores.json` read back gives the same table. An expert's own category is the one of its name.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from bar_ray import storage
from bar_ray.categories import OVERALL
from bar_ray.graph import Step
from bar_ray.recipe import STAGES
from bar_ray.storage import StorageError
from bar_ray.types import Artifact

Models = Mapping[str, Mapping[str, float]]
LAST = ("merged", "bar")


def read_from_artifact(artifact: Artifact, file: str) -> Any:
    """One JSON file of an artifact, checked against its manifest; None when it is not there.

    Fetching would bring and verify the whole artifact, which may be a model.
    """
    manifest = storage.read_manifest(artifact.uri)
    if manifest is None or file not in manifest.files:
        return None
    place = storage.join(artifact.uri, manifest.data, file)
    raw = storage.read_bytes(place)
    if hashlib.sha256(raw).hexdigest() != manifest.files[file]["sha256"]:
        raise StorageError(
            f"{place} is damaged\ndelete its artifact and run the same command again"
        )
    return json.loads(raw)


def collect(evaluations: Mapping[str, Step]) -> dict[str, dict[str, dict[str, Any]]]:
    """`{"models": {name: {category: score, "overall": score}}}` of every model scored so far.

    `intervals` are their 95 % intervals over test items, likewise.
    """
    found = {
        name: read_from_artifact(step.artifact, "scores.json") for name, step in evaluations.items()
    }
    models = {name: content["scores"] for name, content in found.items() if content}
    bounds = {name: content.get("intervals", {}) for name, content in found.items() if content}
    return {
        kind: {n: each[n] for n in ordered(models)}
        for kind, each in {"models": models, "intervals": bounds}.items()
    }


def ordered(models: Models) -> list[str]:
    """Base, the experts stage by stage, anything else, merged, bar."""
    domains = list(dict.fromkeys(domain_of(name) for name in models))

    def place(name: str) -> tuple[int, int, int]:
        if domain := domain_of(name):
            return 1, domains.index(domain), STAGES.index(stage_of(name))
        return (0 if name == "base" else 3 if name in LAST else 2), 0, name == "bar"

    return sorted(models, key=place)


def domain_of(name: str) -> str:
    """The domain of an expert's model name, '' for any other model."""
    domain, _, stage = name.rpartition(" ")
    return domain if stage in STAGES else ""


def stage_of(name: str) -> str:
    return name.rpartition(" ")[2]


def categories(models: Models) -> list[str]:
    """Every category, without `overall`."""
    return [c for c in dict.fromkeys(c for row in models.values() for c in row) if c != OVERALL]


def finals(models: Models) -> dict[str, str]:
    """Domain -> name of its expert after the last stage, where its own category is scored."""
    last = {domain_of(name): name for name in ordered(models) if domain_of(name)}
    return {domain: name for domain, name in last.items() if domain in models[name]}


def gains(models: Models, name: str) -> dict[str, float]:
    """What a model has over the base, in points."""
    base = models.get("base", {})
    return {c: score - base[c] for c, score in models.get(name, {}).items() if c in base}


def retention(models: Models) -> dict[str, float]:
    """Domain -> the routed model's score as a percentage of the expert's own."""
    bar, last = models.get("bar", {}), finals(models)
    own = {domain: models[name][domain] for domain, name in last.items()}
    return {d: 100 * bar[d] / score for d, score in own.items() if d in bar and score > 0}


def mean(values: Mapping[str, float]) -> float | None:
    return sum(values.values()) / len(values) if values else None


def noise(scores: Mapping[str, Mapping]) -> str:
    """The last model's 95 % intervals, in words; empty where none were recorded."""
    name = next(reversed(ordered(scores["models"])), "")
    bounds = scores.get("intervals", {}).get(name, {})
    shown = ", ".join(f"{c} {low:.1f} to {high:.1f}" for c, (low, high) in bounds.items())
    return f"{name}, 95 % over test items: {shown}" if shown else ""


# ---- as text


def _cells(models: Models, own: str) -> list[list[str]]:
    """Header and rows of the table; `own` is how an expert's own category is marked."""
    columns = [*categories(models), OVERALL]
    rows = [["model", *columns]]
    for name in ordered(models):
        shown = {c: f"{score:.1f}" for c, score in models[name].items()}
        if (domain := domain_of(name)) in shown:
            shown[domain] = own.format(shown[domain])
        rows.append([name, *(shown.get(c, "-") for c in columns)])
    gained, kept = gains(models, "bar"), retention(models)
    if gained:
        rows.append(["bar - base", *(f"{gained[c]:+.1f}" if c in gained else "-" for c in columns)])
    if kept:
        percent = {c: f"{value:.0f}%" for c, value in {**kept, OVERALL: mean(kept)}.items()}
        rows.append(["bar / expert", *(percent.get(c, "-") for c in columns)])
    return rows


def table(scores: Mapping[str, Models]) -> str:
    """The score table for a console: aligned columns, `*` at each expert's own category."""
    rows = _cells(scores["models"], "*{}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    padded = [[cell.rjust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    lines = ["  ".join([cells[0].strip().ljust(widths[0]), *cells[1:]]) for cells in padded]
    rule = "-" * len(lines[0])
    derived = sum(row[0] in ("bar - base", "bar / expert") for row in rows)
    body = lines[1 : len(lines) - derived]
    tail = [rule, *lines[len(lines) - derived :]] if derived else []
    note = ["percent right; * is the expert's own category", noise(scores)]
    return "\n".join([lines[0], rule, *body, *tail, *filter(None, note)])


def markdown(scores: Mapping[str, Models]) -> str:
    """The score table for a README or a model card, each expert's own category in bold."""
    header, *rows = ([c.replace("|", r"\|") for c in r] for r in _cells(scores["models"], "**{}**"))
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    rows = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join(filter(None, [rows, noise(scores)]))
