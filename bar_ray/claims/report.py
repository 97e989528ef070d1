"""What came of the claims: `claims.json` for programs, a page of Markdown for people."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from bar_ray import storage
from bar_ray.categories import OVERALL
from bar_ray.claims import plots
from bar_ray.claims.arms import GENERAL, Arms
from bar_ray.claims.claims import CLAIMS, MARGIN, PAPER, Claim, Evidence, Finding
from bar_ray.claims.table import Estimate
from bar_ray.log import duration
from bar_ray.recipe import Recipe
from bar_ray.types import UserError
from bar_ray.validate import nearest, require_categories

PICTURES = "claims"  # folder beside the page


def chosen(recipe: Recipe) -> list[Claim]:
    """The claims that the recipe asks for; all of them by default."""
    known, settings = {claim.number: claim for claim in CLAIMS}, recipe.reproduce
    for name, numbers in (("claims", settings.claims), ("notes", settings.notes)):
        for number in numbers:
            if number not in known:
                hint = nearest(str(number), list(map(str, known)))
                raise UserError(
                    f"reproduce.{name}: no claim {number}; {hint or f'there are {sorted(known)}'}"
                )
    return [known[number] for number in settings.claims or known]


def arms_of(recipe: Recipe, claims: Sequence[Claim], seed: str = "") -> Arms:
    """Every model that the claims compare."""
    why = f"claims are judged by a category for each expert and `{GENERAL}`"
    require_categories(recipe, [*recipe.experts, GENERAL], why)
    arms = Arms(recipe, seed)
    for claim in claims:
        claim.arms(arms)
    return arms


def judge(found: Evidence, claims: Sequence[Claim]) -> dict[str, Any]:
    """Verdicts and figures of all claims, and the scores of all models."""
    table, notes = found.table, found.recipe.reproduce.notes
    findings = {claim.number: claim.judge(found) for claim in claims}
    memory = psutil.virtual_memory().total / 2**30
    return {
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{os.cpu_count()} cores, {memory:.0f} GiB, {platform.machine()}",
        "runs": _runs(found),
        "seeds": table.seeds,
        "claims": [
            _entry(claim, findings[claim.number]) | {"note": notes.get(claim.number, "")}
            for claim in claims
        ],
        "scores": {
            model: {c: asdict(table.score(model, c)) for c in (*table.categories, OVERALL)}
            for model in table.models
        },
    }


def _entry(claim: Claim, finding: Finding) -> dict[str, Any]:
    return {
        **{"number": claim.number, "claim": claim.text, "source": PAPER},
        **{"published": claim.published, "verdict": finding.verdict, "why": finding.why},
        "measured": {name: asdict(each) for name, each in finding.measured.items()},
        "curves": {name: asdict(each) for name, each in finding.curves.items()},
    }


def _runs(found: Evidence) -> dict[str, float]:
    """How many runs made the models and their scores, and how long those took."""
    past = found.past
    made = {event["run"] for event in past.made_by().values()}
    times = [[event["time"] for event in past.of_run(run)] for run in made]
    return {"count": len(made), "seconds": sum(max(each) - min(each) for each in times)}


def write(recipe: Recipe, found: dict[str, Any], command: str) -> str:
    """Put claims.json, claims.md and its pictures into the storage's report; returns its folder."""
    folder = storage.join(recipe.storage, "report")
    found = {"command": command, **found}
    drawn = plots.draw(found)
    page = markdown(found, list(drawn))
    files = {f"{PICTURES}/{name}": content for name, content in drawn.items()}
    files |= {"claims.md": page.encode(), "claims.json": json.dumps(found, indent=1).encode()}
    for name, content in files.items():
        storage.write_bytes(storage.join(folder, name), content)
    return folder


def copy(folder: str, target: str) -> None:
    """The page and its pictures into a folder of this machine."""
    pictures = storage.list_files(storage.join(folder, PICTURES))
    names = [f"{PICTURES}/{uri.partition('?')[0].rpartition('/')[2]}" for uri in pictures]
    for name in ("claims.md", *names):
        place = Path(target, name)
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(storage.read_bytes(storage.join(folder, name)))


def summary(found: Mapping[str, Any]) -> str:
    """One line a claim."""
    return "\n".join(f"{c['number']:>3}  {c['verdict']:<14}  {c['claim']}" for c in found["claims"])


def markdown(found: Mapping[str, Any], pictures: Sequence[str] = ()) -> str:
    """The page, from nothing but the content of claims.json, with links to its pictures."""
    seeds, runs = ", ".join(map(str, found["seeds"])), found["runs"]
    lines = [
        "# The claims of the paper, measured",
        "",
        f"    {found['command']}",
        "",
        f"On {found['machine']}, {found['made']}, seeds {seeds}; {duration(runs['seconds'])} in "
        f"{runs['count']} run{'s' * (runs['count'] != 1)}. Scores are percent right on held-out "
        "tests. Differences are in points, paired by test item, with the 95 % interval "
        "over items; the seeds' own differences stand beside. Better means that the interval and "
        f"every seed are above zero; not lost, that the interval is above -{MARGIN:g} points.",
        "",
        "| | claim | verdict |",
        "|---|---|---|",
    ]
    lines += [f"| {c['number']} | {c['claim']} | **{c['verdict']}** |" for c in found["claims"]]
    for claim in found["claims"]:
        lines += ["", f"## {claim['number']}. {claim['claim']}", ""]
        lines += [f"Published: {claim['published']} ({claim['source']}).", ""]
        lines += [f"**{claim['verdict']}**: {claim['why']}.", ""]
        lines += [claim["note"], ""] if claim["note"] else []
        mine = [name for name in pictures if name.startswith(f"{claim['number']}-")]
        lines += [f"![{claim['claim']}]({PICTURES}/{name})\n" for name in mine]
        lines += ["| | measured | 95 % | by seed |", "|---|---|---|---|"]
        lines += [_row(name, each) for name, each in claim["measured"].items()]
    lines += ["", "## All scores", ""]
    lines += [f"![scores]({PICTURES}/{plots.MATRIX})\n"] if plots.MATRIX in pictures else []
    lines += [*_scores(found["scores"])]
    return "\n".join(lines) + "\n"


def _estimate(values: Mapping[str, Any]) -> Estimate:
    return Estimate(**{**values, "by_seed": tuple(values["by_seed"])})


def _row(name: str, values: Mapping[str, Any]) -> str:
    each = _estimate(values)
    by_seed = ", ".join(f"{value:.1f}" for value in each.by_seed)
    interval = f"{each.low:.1f} to {each.high:.1f}"
    return f"| {name} | {each.mean:.1f} {each.unit} | {interval} | {by_seed} |"


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    categories = list(next(iter(scores.values())))
    lines = [f"| | {' | '.join(categories)} |", "|---" * (len(categories) + 1) + "|"]
    for model, row in scores.items():
        each = [_estimate(row[category]) for category in categories]
        cells = [f"{score.mean:.1f} ± {score.spread:.1f}" for score in each]
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines
