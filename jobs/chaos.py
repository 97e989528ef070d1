"""Faults at random while a run is at work: nothing may be lost, repeated or left behind.

    python jobs/chaos.py conf/chaos.yaml
    python jobs/chaos.py conf/chaos.yaml --faults 5 --seed 1

Brings its own cluster and object storage on this machine; figures go to <storage>/chaos/<time>/.
"""

import argparse
import sys
import time

from bar_ray import pipeline, storage
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    if args.plan:
        return session.show_plan(recipe, pipeline.build(recipe).targets)
    session.own_token()
    from bar_ray.bench import chaos

    root = storage.join(recipe.storage, "chaos", time.strftime("%Y%m%d-%H%M%S"))
    found = chaos.run(recipe, args.faults, args.seed, root)
    print(chaos.table(found))
    sys.exit(bool(chaos.mistakes(found)))


if __name__ == "__main__":
    cli = Cli(__doc__).add("--faults", type=int, default=40, help="at most so many")
    cli.add("--seed", type=int, default=0, help="of their kinds and times").run(main)
