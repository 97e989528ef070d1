"""The report of a run: `scores.json` for programs, one self-contained `report.html` for people.

The page needs no network, no script and no library to read: inline CSS, inline SVG drawn here by
hand (a plotting library would fix the colours, and the page must serve light and dark).
"""

import json

from bar_ray import storage
from bar_ray.pipeline import Pipeline
from bar_ray.recipe import Recipe
from bar_ray.report import page
from bar_ray.report.scores import collect, markdown, table

__all__ = ["collect", "markdown", "table", "write"]


def write(pipeline: Pipeline, recipe: Recipe, run_id: str) -> dict[str, dict]:
    """Write `<storage>/report/{scores.json, report.html}` and return the content of the first."""
    found = collect(pipeline.scores)
    folder = storage.join(recipe.storage, "report")
    # Not sorted: the file lists the models in the order of the table.
    text = json.dumps(found, indent=1, ensure_ascii=False) + "\n"
    storage.write_bytes(storage.join(folder, "scores.json"), text.encode())
    html = page.render(pipeline, recipe, run_id, found["models"])
    storage.write_bytes(storage.join(folder, "report.html"), html.encode())
    return found
