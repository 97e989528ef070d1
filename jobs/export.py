"""Export some experts of the finished model as a model of their own, without training.

    python jobs/export.py conf/tiny.yaml --experts math,code
    python jobs/export.py conf/tiny.yaml --without safety

The experts that stay are merged again and the router keeps its rows for them; scores are measured,
so that one sees what is lost beside training the router again (jobs/upgrade.py --remove).
"""

import argparse

from bar_ray import report, storage, subset
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe


def names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    part = subset.work_out(recipe, names(args.experts), names(args.without))
    targets = part.pipeline.targets
    if args.plan:
        return session.show_plan(recipe, targets)
    session.drive(recipe, targets)
    print(report.table(report.collect(part.pipeline.scores)))
    folder = part.export()
    print(f"model   {folder}")
    if storage.is_local(folder):
        print(f"serve   vllm serve {folder}")
    else:  # vLLM reads models from disks
        print(f"serve   copy {folder} to a disk, then: vllm serve FOLDER")


if __name__ == "__main__":
    cli = Cli(__doc__)
    chosen = cli.parser.add_mutually_exclusive_group(required=True)
    chosen.add_argument("--experts", default="", metavar="NAMES", help="to keep, parted by commas")
    chosen.add_argument("--without", default="", metavar="NAMES", help="to leave out")
    cli.run(main)
