"""Train the router of the merged model on the stratified sample of the SFT data.

    python jobs/train_router.py conf/tiny.yaml router.fraction=0.1

What it needs (experts, merged model, sample) is made first when it is not there yet.
"""

import argparse

from bar_ray import pipeline
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    bar = pipeline.build(recipe).bar
    if args.plan:
        return session.show_plan(recipe, [bar])
    session.drive(recipe, [bar])
    print(f"model   {bar.artifact.uri}")


if __name__ == "__main__":
    Cli(__doc__).run(main)
