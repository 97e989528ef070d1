"""Score a checkpoint on every category's held-out tests.

    python jobs/evaluate.py conf/tiny.yaml --model bar
    python jobs/evaluate.py conf/tiny.yaml --checkpoint s3://bucket/model

`--model` names a model of the recipe (base, math sft, merged, bar, ...); `--checkpoint` is any
Hugging Face folder with a tokenizer and a chat template.
"""

import argparse

from bar_ray import pipeline, report
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe
from bar_ray.validate import pick


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    graph = pipeline.build(recipe)
    if args.checkpoint:
        scores = {args.checkpoint: pipeline.evaluate_folder(recipe, args.checkpoint)}
    else:
        scores = {args.model: pick("model", args.model, graph.scores)}
    if args.plan:
        return session.show_plan(recipe, scores.values())
    session.drive(recipe, list(scores.values()))
    print(report.table(report.collect(scores)))


if __name__ == "__main__":
    cli = Cli(__doc__).add("--model", default="bar", help="a model of the recipe")
    cli.add("--checkpoint", default="", help="any checkpoint folder instead").run(main)
