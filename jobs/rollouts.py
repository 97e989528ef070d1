"""What an expert answers to its RLVR prompts, graded, without learning from it.

    python jobs/rollouts.py conf/tiny.yaml --expert math --steps 2

Samples from the model that enters the expert's RLVR stage (trained first when it is not there yet).
Writes JSONL by step, which `experts.NAME.rlvr.replay` takes, and a page to read.
"""

import argparse

from bar_ray import pipeline, storage
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe
from bar_ray.validate import pick


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    pick("expert", args.expert, recipe.experts)
    step = pipeline.rollouts(recipe, args.expert, args.steps)
    if args.plan:
        return session.show_plan(recipe, [step])
    session.drive(recipe, [step])
    print(f"rollouts     {step.artifact.uri}")
    print(f"transcripts  {storage.join(step.artifact.uri, 'transcripts.html')}")


if __name__ == "__main__":
    cli = Cli(__doc__).add("--expert", required=True, help="a domain under `experts`")
    cli.add("--steps", type=int, default=1, help="batches to sample").run(main)
