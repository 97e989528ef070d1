"""An exact stratified 5 % of a million rows, and reading training rows back.

Ray has a fixed price for a job of any size, which the smallest sample shows. polars and duckdb hash
the line as it stands; ours hashes the row's content, whatever the layout of the file.
"""

import json
import logging
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import duckdb
import numpy as np
import polars
import pyarrow
import ray
import ray.data
import torch

from bar_ray.bench import rounds
from bar_ray.cluster import session
from bar_ray.data import sample
from bar_ray.data.batches import Batches
from bar_ray.data.pack import PackStats, Row, TokenShard, write_rows
from bar_ray.recipe import Run, Stage

ROWS, SOURCES, FRACTION = 1_000_000, 8, 0.05


def run(num_rounds: int = 3) -> list[rounds.Row]:
    with tempfile.TemporaryDirectory() as place:
        many, few = Path(place, "many.jsonl"), Path(place, "few.jsonl")
        write(many, ROWS)
        write(few, 100)
        sides = {
            "ours": lambda: ours(many),
            "ours, 100 rows": lambda: ours(few),
            "polars": lambda: with_polars(many),
            "duckdb": lambda: with_duckdb(many),
        }
        counts = {name: sides[name]() for name in ("ours", "polars", "duckdb")}
        if len(set(counts.values())) > 1:
            raise AssertionError(f"samples differ in size: {counts}")
        what = f"stratified {FRACTION:.0%} of {ROWS:,} rows"
        timed = {name: _untold(side) for name, side in sides.items()}
        return [rounds.measure(what, timed, num_rounds), _loading(Path(place), num_rounds)]


def _untold(side: Callable[[], int]) -> Callable[[], None]:
    def act() -> None:
        side()

    return act


def write(path: Path, rows: int) -> None:
    """Conversations of a few hundred bytes; sources of very different size."""
    chosen = random.Random(0)
    words = ["".join(chosen.choices("abcdefghij", k=5)) for _ in range(997)]
    with open(path, "w") as file:
        for number in range(rows):
            asked, answer = (" ".join(chosen.choices(words, k=20)) for _ in range(2))
            row = {
                "id": number,
                "source": f"s{int(SOURCES * chosen.random() ** 3)}",
                "messages": [
                    {"role": "user", "content": asked},
                    {"role": "assistant", "content": answer},
                ],
            }
            file.write(json.dumps(row) + "\n")


def ours(path: Path) -> int:
    if not ray.is_initialized():
        os.environ |= {**session.RAY_ENVIRONMENT, **os.environ}
        quiet = {"log_to_driver": False, "logging_level": "ERROR", "include_dashboard": False}
        ray.init(num_cpus=2, **quiet)
        ray.data.DataContext.get_current().enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
    return len(sample.stratified(str(path), FRACTION, 0))


def with_polars(path: Path) -> int:
    lines = polars.scan_csv(
        path, has_header=False, new_columns=["line"], separator="\x01", quote_char=None
    )
    source = polars.col("line").str.extract(r'"source": "([^"]*)"').alias("source")
    keyed = lines.with_columns(source, polars.col("line").hash(0).alias("hash"))
    rank = polars.col("hash").rank("ordinal").over("source")
    wanted = (polars.len().over("source") * FRACTION).ceil()
    return len(keyed.filter(rank <= wanted).collect())


def with_duckdb(path: Path) -> int:
    query = f"""
        select line from (
            select line,
                row_number() over (partition by source order by hash(line)) as place,
                count(*) over (partition by source) as size
            from (
                select line, regexp_extract(line, '"source": "([^"]*)"', 1) as source
                from read_csv('{path}', header = false, columns = {{'line': 'varchar'}},
                    delim = '\\x01', quote = '', escape = '')
            )
        ) where place <= ceil(size * {FRACTION})
    """
    return len(duckdb.connect(config={"threads": torch.get_num_threads()}).sql(query).fetchall())


TRAINING_ROWS, ROW_TOKENS, BATCH, STEPS = 5_000, 4096, 64, 50


def _loading(place: Path, num_rounds: int) -> rounds.Row:
    """Global batches of 64 rows of 4,096 tokens in training order, as tensors."""
    folder = str(place / "tokens")
    generator = np.random.default_rng(0)

    def filled() -> Iterator[Row]:
        for _ in range(TRAINING_ROWS):
            row = Row(ROW_TOKENS, 0)
            ids = generator.integers(1, 100_000, ROW_TOKENS)
            row.add(ids.tolist(), [1] * ROW_TOKENS)
            yield row

    Path(folder).mkdir()
    write_rows(folder, filled(), ROW_TOKENS, PackStats(rows=TRAINING_ROWS))
    stage = Stage(steps=STEPS, batch_size=BATCH, seq_len=ROW_TOKENS, run=Run(micro_batch=BATCH))
    batches = Batches([folder], [1.0], stage, seed=0)
    shard = TokenShard(folder)
    columns = {"tokens": shard.tokens, "loss": shard.loss, "positions": shard.positions}
    arrays = {
        name: pyarrow.FixedSizeListArray.from_arrays(np.asarray(values).reshape(-1), ROW_TOKENS)
        for name, values in columns.items()
    }
    datasets.Dataset(pyarrow.table(arrays)).save_to_disk(str(place / "datasets"))
    loaded = datasets.load_from_disk(str(place / "datasets")).with_format("torch")

    def ours() -> None:
        for step in range(STEPS):
            batches(step, 0, 1)

    def peer() -> None:
        loader = torch.utils.data.DataLoader(loaded, batch_size=BATCH, shuffle=True)
        for _, batch in zip(range(STEPS), loader, strict=False):
            batch["tokens"].long()

    sides = {"ours": ours, "datasets with a DataLoader": peer}
    return rounds.measure(f"{STEPS} batches of {BATCH} rows of {ROW_TOKENS:,}", sides, num_rounds)
