"""Who holds what of the cluster and who waits for what, as the newest run on a storage sees it.

    python jobs/pool.py conf/tiny.yaml
    python jobs/pool.py conf/tiny.yaml --json

The run writes it every few seconds; other runs on the same cluster are in it too.
"""

import argparse
import json
import time

from bar_ray import storage
from bar_ray.cli import Cli
from bar_ray.cluster import pool, session
from bar_ray.log import duration
from bar_ray.recipe import Recipe
from bar_ray.types import UserError


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    runs = storage.join(session.absolute_storage(recipe).storage, "runs")
    views = [u for u in storage.list_files(runs, recursive=True) if "/pool.json" in u]
    if not views:
        raise UserError(f"no run has written a view of its pool to {runs}")
    view = storage.read_json(max(views))
    if args.json:
        return print(json.dumps(view, indent=2))
    print(f"run {view['run']}, {duration(time.time() - view['time'])} ago")
    print(pool.render(view) if view["steps"] else "it has ended: nothing is held")


if __name__ == "__main__":
    Cli(__doc__).add("--json", action="store_true", help="print JSON").run(main)
