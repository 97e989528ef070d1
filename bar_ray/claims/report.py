"""What came of the claims: `claims.json` for programs, a page of Markdown for people."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from bar_ray import storage
from bar_ray.claims.arms import Arms
from bar_ray.claims.claims import CLAIMS, PAPER, Claim, Evidence, Finding
from bar_ray.claims.table import OVERALL, Estimate
from bar_ray.config import nearest
from bar_ray.recipe import Recipe
from bar_ray.types import UserError


def chosen(recipe: Recipe) -> list[Claim]:
    """The claims that the recipe asks for; all of them by default."""
    known = {claim.number: claim for claim in CLAIMS}
    for number in recipe.reproduce.claims:
        if number not in known:
            hint = nearest(str(number), list(map(str, known)))
            raise UserError(
                f"reproduce.claims: no claim {number}; {hint or f'there are {sorted(known)}'}"
            )
    return [known[number] for number in recipe.reproduce.claims or known]


def arms_of(recipe: Recipe, claims: Sequence[Claim]) -> Arms:
    """Every model that the claims compare."""
    arms = Arms(recipe)
    for claim in claims:
        claim.arms(arms)
    return arms


def judge(found: Evidence, claims: Sequence[Claim]) -> dict[str, Any]:
    """Verdicts and figures of all claims, and the scores of all models."""
    table = found.table
    findings = {claim.number: claim.judge(found) for claim in claims}
    return {
        "made": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "seeds": table.seeds,
        "claims": [_entry(claim, findings[claim.number]) for claim in claims],
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
    }


def write(recipe: Recipe, found: dict[str, Any], command: str) -> str:
    """Put claims.json and claims.md into the storage's report; returns the Markdown."""
    folder = storage.join(recipe.storage, "report")
    text = json.dumps({"command": command, **found}, indent=1) + "\n"
    storage.write_bytes(storage.join(folder, "claims.json"), text.encode())
    page = markdown({"command": command, **found})
    storage.write_bytes(storage.join(folder, "claims.md"), page.encode())
    return page


def markdown(found: Mapping[str, Any]) -> str:
    """The page, from nothing but the content of claims.json."""
    seeds = ", ".join(map(str, found["seeds"]))
    lines = [
        "# The claims of the paper, measured",
        "",
        f"    {found['command']}",
        "",
        f"On {found['machine']}, {found['made']}, seeds {seeds}. Scores are percent right on "
        "held-out tests. Differences are in points, paired by test item, with the 95 % interval "
        "over items; the seeds' own differences stand beside. A verdict needs the interval and "
        "every seed on one side of zero.",
        "",
        "| | claim | verdict |",
        "|---|---|---|",
    ]
    lines += [f"| {c['number']} | {c['claim']} | **{c['verdict']}** |" for c in found["claims"]]
    for claim in found["claims"]:
        lines += ["", f"## {claim['number']}. {claim['claim']}", ""]
        lines += [f"Published: {claim['published']} ({claim['source']}).", ""]
        lines += [f"**{claim['verdict']}**: {claim['why']}.", ""]
        lines += ["| | measured | 95 % | by seed |", "|---|---|---|---|"]
        lines += [_row(name, each) for name, each in claim["measured"].items()]
    lines += ["", "## All scores", "", *_scores(found["scores"])]
    return "\n".join(lines) + "\n"


def _row(name: str, values: Mapping[str, Any]) -> str:
    each = Estimate(**{**values, "by_seed": tuple(values["by_seed"])})
    by_seed = ", ".join(f"{value:.1f}" for value in each.by_seed)
    return f"| {name} | {each.mean:.1f} | {each.low:.1f} to {each.high:.1f} | {by_seed} |"


def _scores(scores: Mapping[str, Mapping[str, Any]]) -> list[str]:
    categories = list(next(iter(scores.values())))
    lines = [f"| | {' | '.join(categories)} |", "|---" * (len(categories) + 1) + "|"]
    for model, row in scores.items():
        cells = []
        for category in categories:
            each = Estimate(**{**row[category], "by_seed": tuple(row[category]["by_seed"])})
            cells.append(f"{each.mean:.1f} ± {each.spread:.1f}")
        lines.append(f"| {model} | {' | '.join(cells)} |")
    return lines
