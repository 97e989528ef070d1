"""Watch a run, or look at one that has ended: a page with experts, curves, the pool and faults.

    python jobs/serve_board.py conf/tiny.yaml
    python jobs/serve_board.py conf/olmo2_7b.yaml --run 20260101-120000-abcd --port 0

Reads what runs write to the recipe's storage, also object storage; no cluster is needed. Served to
this machine alone; on another --host it asks for Ray's token.
"""

import argparse
import asyncio

from bar_ray.board import grafana, server, state
from bar_ray.board.server import Board
from bar_ray.cli import Cli
from bar_ray.cluster import session
from bar_ray.recipe import Recipe


def main(recipe: Recipe, args: argparse.Namespace) -> None:
    if args.grafana:
        return print(*grafana.write(args.grafana), sep="\n")
    recipe = session.absolute_storage(recipe)
    run_id = state.pick(recipe.storage, args.run)
    asyncio.run(serve(Board(recipe.storage, run_id, args.ray), args.host, args.port))


async def serve(board: Board, host: str, port: int) -> None:
    runner, url = await server.serve(board, host, port)
    print(f"board  {url}  (Ctrl-C ends it)", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()


if __name__ == "__main__":
    cli = Cli(__doc__).add("--run", default="", help="a run id; the newest by default")
    cli.add("--host", default="127.0.0.1", help="where to listen")
    cli.add("--port", type=int, default=8299, help="0 takes a free one")
    cli.add("--grafana", default="", help="write Grafana's dashboards to this folder, and stop")
    cli.add("--ray", default="", help="URL of Ray's dashboard, for links").run(main)
