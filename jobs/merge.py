"""Gather the expert checkpoints from storage and merge them into one model.

    python jobs/merge.py conf/tiny.yaml

Missing experts are trained first; the router is left as the experts' rows (see train_router.py).
"""

import argparse

from bar_ray import pipeline
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    merged = pipeline.build(recipe).merged
    if args.plan:
        return session.show_plan(recipe, [merged])
    session.drive(recipe, [merged])
    print(f"merged  {merged.artifact.uri}")


if __name__ == "__main__":
    Cli(__doc__).run(main)
