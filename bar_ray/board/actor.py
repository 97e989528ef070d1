"""The board beside a run: an actor on the driver's node that serves it while the run is at work."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from bar_ray.board import grafana, server
from bar_ray.board.server import Board
from bar_ray.cluster.run import Run


@ray.remote(num_cpus=0)
class Serving:
    """Serves one storage's runs, the given one first."""

    async def start(self, storage_uri: str, run_id: str, port: int, ray_url: str) -> str:
        board = Board(storage_uri, run_id, ray_url)
        self.runner, url = await server.serve(board, "127.0.0.1", port)
        return url


@contextlib.contextmanager
def beside(run: Run) -> Iterator[None]:
    """Serve the board as long as the block lasts, when the recipe asks for it."""
    provision()
    tracking = run.recipe.tracking
    if tracking.board < 0:
        yield
        return
    here = NodeAffinitySchedulingStrategy(run.head, soft=False)
    serving = Serving.options(scheduling_strategy=here).remote()
    dashboard = ray.worker.global_worker.node.address_info.get("webui_url") if _has_node() else ""
    url = f"http://{dashboard}" if dashboard else ""
    place = serving.start.remote(run.recipe.storage, run.run_id, tracking.board, url)
    print(f"board  {ray.get(place)}", flush=True)
    try:
        yield
    finally:
        ray.kill(serving)


def provision() -> None:
    """Put the dashboards where the Grafana of this head looks, when it is here."""
    if _has_node():
        folder = Path(ray.worker.global_worker.node.get_session_dir_path(), "metrics", "grafana")
        if (folder / "dashboards").is_dir():
            with contextlib.suppress(OSError):  # of another user: its owner can run --grafana
                grafana.write(folder / "dashboards")


def _has_node() -> bool:
    return ray.worker.global_worker.node is not None
