"""Sweep over settings of a recipe with Ray Tune, and write the best recipe.

    python jobs/sweep.py conf/sweeps/unfreezing.yaml
    python jobs/train_all.py outputs/sweep/sweeps/unfreezing-1a2b3c4d/best.yaml

Trials share the pool and everything they have in common; those that fall behind are stopped. The
same command again continues where it stopped. Results go to <storage>/sweeps/<name>-<hash>/: the
ranked trials (trials.json), a picture (sweep.svg), the best recipe (best.yaml).
"""

import argparse
from pathlib import Path

from bar_ray import storage
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    from bar_ray import sweep

    recipe = session.absolute_storage(recipe)
    source = sweep.Source.of(args.recipe, args.overrides, recipe)
    sweep.space(recipe.sweep)
    sweep.check(recipe)
    root = sweep.folder_of(source, recipe.sweep, recipe, Path(args.recipe).stem)
    if args.plan:
        return session.show_plan(recipe, sweep.prepare(recipe))
    with session.connected(recipe):
        session.run_here(recipe, sweep.prepare(recipe))
        trials = sweep.run(source, recipe.sweep, root)
    sweep.write(source, trials, root)
    print(sweep.table(trials))
    print(f"best    {storage.join(root, 'best.yaml')}")


if __name__ == "__main__":
    Cli(__doc__).run(main)
