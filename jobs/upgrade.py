"""Change one expert of a finished model, and see what it did.

    python jobs/upgrade.py conf/tiny.yaml --replace code       # by its newest published version
    python jobs/upgrade.py conf/tiny.yaml --replace code=1
    python jobs/upgrade.py conf/tiny.yaml --add safety
    python jobs/upgrade.py conf/tiny.yaml --remove safety
    python jobs/upgrade.py conf/tiny.yaml --rollback           # or --rollback --to 3

Experts are published by jobs/train_all.py and jobs/train_expert.py. The merge and the router are
made again, all experts stay as they are; the model before stays in the registry.
"""

import argparse

from bar_ray import upgrade
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe
from bar_ray.types import UserError
from bar_ray.upgrade import Change


def change_of(args: argparse.Namespace) -> Change:
    """The one change that the command line asks for."""
    for kind in ("replace", "add", "remove"):
        if expert := getattr(args, kind):
            domain, _, version = expert.partition("=")
            if version and not version.isdigit():
                raise UserError(f"--{kind} {expert}: a version is a number, such as {domain}=2")
            return Change(kind, domain, int(version or 0))
    return Change("rollback", version=args.to)


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    change = upgrade.work_out(recipe, change_of(args))
    if args.plan:
        return session.show_plan(recipe, change.targets)
    session.drive(recipe, change.targets)
    print(upgrade.table(change))
    print(f"model   version {change.publish()}: {change.export()}")


if __name__ == "__main__":
    cli = Cli(__doc__)
    change = cli.parser.add_mutually_exclusive_group(required=True)
    for name in ("--replace", "--add", "--remove"):
        change.add_argument(name, metavar="EXPERT[=VERSION]")
    change.add_argument("--rollback", action="store_true", help="to the model before this one")
    cli.add("--to", type=int, default=0, help="with --rollback: to this version").run(main)
