"""Train every expert, merge them, train the router, evaluate, export and report.

    python jobs/train_all.py conf/tiny.yaml
    python jobs/train_all.py conf/tiny.yaml --plan experts.code.sft.lr=2e-3

The same command again continues where it stopped and reuses what is finished.
"""

import argparse

from bar_ray import export, pipeline, report, storage, versions
from bar_ray.board import beside
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    graph = pipeline.build(recipe)
    if args.plan:
        return session.show_plan(recipe, graph.targets)
    run_id = session.drive(recipe, graph.targets, beside)
    scores = report.write(graph, recipe, run_id)
    versions.publish(graph, recipe, scores)
    print(report.table(scores))
    print(f"model   {export.export(graph, recipe, scores)}")
    print(f"report  {storage.join(recipe.storage, 'report', 'report.html')}")


if __name__ == "__main__":
    Cli(__doc__).run(main)
