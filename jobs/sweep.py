"""Sweep over settings of a recipe with Ray Tune, and write the best recipe.

    python jobs/sweep.py conf/sweeps/unfreezing.yaml
    python jobs/train_all.py outputs/sweep/sweeps/unfreezing/best.yaml storage=outputs/best

Trials share the pool and everything they have in common; those that fall behind are stopped. The
same command again continues where it stopped. Results go to <storage>/sweeps/<name>/: the ranked
trials (trials.json), a picture (sweep.svg), the best recipe (best.yaml).
"""

import argparse
from pathlib import Path

from bar_ray import storage
from bar_ray.cluster import session
from bar_ray.config import Cli
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    from bar_ray import sweep

    recipe = session.absolute_storage(recipe)
    source = sweep.Source(str(Path(args.recipe).resolve()), tuple(args.overrides))
    root = storage.join(recipe.storage, "sweeps", Path(args.recipe).stem)
    sweep.space(recipe.sweep)
    if args.plan:
        return session.show_plan(sweep.prepare(recipe))
    with session.connected(recipe):
        session.run_here(recipe, sweep.prepare(recipe))
        trials = sweep.run(source, recipe.sweep, root)
    sweep.write(source, trials, root)
    print(sweep.table(trials))
    print(f"best    {storage.join(root, 'best.yaml')}")


if __name__ == "__main__":
    Cli(__doc__).run(main)
