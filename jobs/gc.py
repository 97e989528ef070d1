"""Delete what nothing refers to: old artifacts, checkpoints of finished steps, unfinished writes.

    python jobs/gc.py conf/tiny.yaml --plan
    python jobs/gc.py conf/tiny.yaml --keep-runs 5 --keep-versions 3 --older-than 24

Kept: what the recipe plans, what the newest runs planned, the newest versions of each published
expert and its best, and all that those were made from. No run may be at work on the storage.
"""

import argparse
import time

from bar_ray import pipeline, retention, storage
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.cluster.lease import Lease
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    old = args.older_than * 3600
    keep = retention.Keep(args.keep_runs, args.keep_versions, old)
    with Lease(recipe.storage, f"gc-{time.time():.0f}", None).taken():
        items = retention.garbage(recipe.storage, pipeline.build(recipe).targets, keep)
        leftovers = storage.leftovers(recipe.storage, old)
        for line in (*map(str, items), *(f"unfinished  {uri}" for uri in leftovers)):
            print(line)
        if not args.plan:
            for uri in (*(item.uri for item in items), *leftovers):
                storage.delete(uri)
    size, count = sum(item.size for item in items), len(items) + len(leftovers)
    print(f"{count} {'to delete' if args.plan else 'deleted'}, {size / 1e6:,.1f} MB")


if __name__ == "__main__":
    cli = Cli(__doc__).add("--keep-runs", type=int, default=5, help="newest runs whose plan stays")
    cli.add("--keep-versions", type=int, default=3, help="newest versions of each expert that stay")
    cli.add("--older-than", type=float, default=24.0, help="hours since it was written to")
    cli.run(main)
