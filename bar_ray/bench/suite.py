"""What `jobs/bench.py` measures by default: parts of interleaved rounds, as a table, JSON, picture.

A part whose peer is not installed is named and left out.
"""

import importlib
import io
import logging
import time
from collections.abc import Sequence
from importlib import metadata

import datasets
import matplotlib
import torch
import transformers
from matplotlib.figure import Figure

from bar_ray import storage
from bar_ray.bench.rounds import Row, table
from bar_ray.log import duration

PARTS = {  # name -> module and function under bar_ray.bench, in the order they run
    "training": "training.run",
    "trainers": "training.trainers",
    "logprob": "logprob.run",
    "merge": "merging.run",
    "data": "sampling.run",
}
PEERS = ("torch", "transformers", "trl", "mergekit", "polars", "duckdb", "ray", "datasets")


def run(names: Sequence[str], root: str) -> str:
    """Measure the parts; results.json and results.svg go to `root` after each of them."""
    rows: list[Row] = []
    missing: list[str] = []
    started = time.monotonic()
    _quieten()
    for place, name in enumerate(names, start=1):
        print(
            f"{name} ({place}/{len(names)}, after {duration(time.monotonic() - started)})",
            flush=True,
        )
        module, _, function = PARTS[name].partition(".")
        try:
            measure = getattr(importlib.import_module(f"bar_ray.bench.{module}"), function)
        except ImportError as error:
            missing.append(f"{name}: {error.name} is not installed (extra `bench`)")
            continue
        measured = measure()
        print(table(measured), flush=True)
        rows += measured
        record = {"versions": versions(), "rows": [row.record() for row in rows]}
        storage.write_json(storage.join(root, "results.json"), record)
        storage.write_bytes(storage.join(root, "results.svg"), picture(rows))
    shown = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join([*missing, shown, f"figures {root}"])


def _quieten() -> None:
    """Peers tell their progress in the middle of ours."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def versions() -> dict[str, str]:
    found = {"threads": str(torch.get_num_threads())}
    for name in PEERS:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def picture(rows: Sequence[Row]) -> bytes:
    """Each peer's time beside ours: a point with its spread, on a logarithmic axis."""
    marks = [(f"{row.what}: {each.peer}", each) for row in rows for each in row.ratios]
    with matplotlib.rc_context({"font.size": 8, "svg.hashsalt": "bar_ray"}):
        figure = Figure(figsize=(7.5, 1 + 0.2 * len(marks)), layout="constrained")
        axes = figure.subplots()
        for place, (_, each) in enumerate(reversed(marks)):
            axes.plot([each.low, each.high], [place, place], color="#4269d0", linewidth=1)
            axes.plot(each.times, place, "o", color="#4269d0", markersize=4)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_yticks(range(len(marks)), [name for name, _ in reversed(marks)])
        axes.set_xscale("log")
        axes.set_xticks(
            [1 / 16, 0.25, 0.5, 1, 2, 4, 8, 16],
            labels=["0.06", "0.25", "0.5", "1", "2", "4", "8", "16"],
        )
        axes.set_xlabel(
            "peer's time / ours (right of 1: ours is faster)\nline: lowest to highest round"
        )
        axes.grid(axis="x", alpha=0.3)
        file = io.BytesIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    return file.getvalue()
