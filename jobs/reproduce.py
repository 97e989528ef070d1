"""Test the claims of the paper: every baseline and ablation, with several seeds.

    python jobs/reproduce.py conf/reproduce.yaml
    python jobs/reproduce.py conf/reproduce.yaml --plan reproduce.claims=[2,9]
    python jobs/reproduce.py conf/reproduce.yaml --docs docs

The same command again continues where it stopped; with one arm changed, only that arm runs.
Verdicts, figures and pictures go to <storage>/report/claims.json, claims.md and claims/.
"""

import argparse
import shlex
import sys
from dataclasses import replace

from bar_ray import storage
from bar_ray.claims import report
from bar_ray.claims.claims import Evidence
from bar_ray.claims.table import Table
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    claims = report.chosen(recipe)
    seeds = recipe.reproduce.seeds
    names = {seed: f"seed {seed}" if len(seeds) > 1 else "" for seed in seeds}
    arms = {s: report.arms_of(replace(recipe, seed=s), claims, names[s]) for s in seeds}
    targets = [step for each in arms.values() for step in each.scores.values()]
    if args.plan:
        return session.show_plan(recipe, targets)
    session.drive(recipe, targets)
    table = Table.read({seed: each.scores for seed, each in arms.items()})
    found = report.judge(Evidence(table, recipe, arms), claims)
    folder = report.write(recipe, found, f"python {shlex.join(sys.argv)}")
    if args.docs:
        report.copy(folder, args.docs)
    print(report.summary(found))
    print(f"report  {storage.join(folder, 'claims.md')}")


if __name__ == "__main__":
    cli = Cli(__doc__).add("--docs", default="", help="also put the page and its pictures here")
    cli.run(main)
