"""Train one expert through its stages, score it, and publish it for jobs/upgrade.py.

    python jobs/train_expert.py conf/tiny.yaml --expert math

The base is trained or imported first when it is not there yet; other experts are left alone.
"""

import argparse

from bar_ray import pipeline, report, versions
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe
from bar_ray.validate import pick


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    graph = pipeline.build(recipe)
    expert = pick("expert", args.expert, graph.experts)
    scores = [
        step for name, step in graph.scores.items() if name.split()[0] in ("base", args.expert)
    ]
    if args.plan:
        return session.show_plan(recipe, [expert, *scores])
    session.drive(recipe, [expert, *scores])
    found = report.collect(graph.scores)
    print(report.table(found))
    own = found["models"].get(f"{args.expert} {expert.verb}", {})
    number = versions.publish_expert(recipe, args.expert, expert, own)
    print(f"expert  version {number}: {expert.artifact.uri}")


if __name__ == "__main__":
    Cli(__doc__).add("--expert", required=True, help="a domain under `experts`").run(main)
