"""Look at data before training on it: faults by file, row and field, tokens, rendered samples.

    python jobs/check_data.py conf/tiny.yaml
    python jobs/check_data.py conf/olmo2_7b.yaml --dataset math_sft
    python jobs/check_data.py conf/olmo2_7b.yaml datasets.my=a.jsonl --dataset my --kind messages

Every dataset that a stage uses, as that stage would read it, and the test files. Samples show what
the model sees; what it learns from stands between >> and << (in colour on a terminal). Ends with
exit code 1 when there is a fault.
"""

import argparse
import sys

from bar_ray import check, pipeline
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.data.rows import KINDS
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    steps = pipeline.data_checks(recipe, args.dataset, args.kind)
    if args.plan:
        return session.show_plan(recipe, steps)
    session.drive(recipe, steps)
    reports = [check.read(step) for step in steps]
    for report in reports:
        print(check.render(report, sys.stdout.isatty()))
    if any(report.num_faults for report in reports):
        sys.exit(1)


if __name__ == "__main__":
    cli = Cli(__doc__).add("--dataset", action="append", default=[], help="only this one")
    cli.add("--kind", choices=list(KINDS), default="", help="as what it is looked at").run(main)
