"""Measure on this machine, against named peers.

    python jobs/bench.py conf/tiny.yaml
    python jobs/bench.py conf/tiny.yaml --what merge,logprob
    python jobs/bench.py conf/tiny.yaml --what rlvr --expert code
    python jobs/bench.py conf/tiny.yaml --what sandbox --minutes 10
    python jobs/bench.py conf/tiny.yaml --what pool

`all`: a step of every training stage, trainers, log-probabilities, merging, sampling and reading
data, in interleaved rounds; or some of these, parted by commas. `rlvr`: asynchronous over
synchronous RLVR, the engines over plain vLLM, both over TRL's GRPOTrainer, from the same checkpoint
(trained first when it is not there yet). `sandbox`: honest and hostile programs side by side, what
they leave behind, and runs per second over bare Python. `pool`: three experts of different length
on one pool of logical GPUs, fair and weighted, over the lower bound, one after another and equal
shares. Figures also go to <storage>/bench/<time>/.
"""

import argparse
import time

from bar_ray import storage
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe
from bar_ray.validate import pick

ALONE = ("rlvr", "sandbox", "pool")  # too long to be part of the others


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    recipe = session.absolute_storage(recipe)
    root = storage.join(recipe.storage, "bench", time.strftime("%Y%m%d-%H%M%S"))
    if args.what == "sandbox":
        from bar_ray.bench import sandbox

        results = sandbox.run(args.slots, args.minutes * 60, root)
        return print(sandbox.table(results))
    if args.what == "pool":
        session.own_token()
        from bar_ray.bench import pool

        return print(pool.table(pool.run(root)))
    if args.what != "rlvr":
        from bar_ray.bench import suite

        parts = list(suite.PARTS) if args.what == "all" else args.what.split(",")
        for part in parts:
            pick("part", part, dict.fromkeys((*suite.PARTS, *ALONE, "all")))
        return print(suite.run(parts, root))
    from bar_ray.bench import rlvr

    pick("expert", args.expert, recipe.experts)
    bench = rlvr.Bench(recipe, args.expert, args.staleness, root)
    if args.plan:
        return session.show_plan(recipe, [bench.rlvr(0), bench.rlvr(args.staleness)])
    print(rlvr.table(rlvr.run(bench)))


if __name__ == "__main__":
    cli = Cli(__doc__).add("--what", default="all", help="all, parts of it, or one of the others")
    cli.add("--expert", default="code", help="whose RLVR stage")
    cli.add("--staleness", type=int, default=4, help="max_staleness of the asynchronous side")
    cli.add("--minutes", type=float, default=10, help="how long sandboxes are used")
    cli.add("--slots", type=int, default=10, help="sandboxes in parallel").run(main)
