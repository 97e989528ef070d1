"""Write the tiny world: every data file of every stage, in the formats real data has."""

import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from bar_ray.tiny import code, general, math, safety, tool_use
from bar_ray.tiny.pretrain import pretrain_row
from bar_ray.tiny.rows import Row

NUM_PRETRAIN = 14_000
NUM_MIDTRAIN = 8_000
NUM_SFT = 4_000
NUM_RARE = 40
NUM_RLVR = 1_000
NUM_HELD_OUT = 40  # scored while RLVR trains; not the tests
NUM_TEST = 120


def prompt_key(row: Row) -> str:
    """What makes two prompts the same item: the turns and the tools offered with them."""
    return json.dumps([row["messages"], row.get("tools", [])])


def unique(rows: Iterator[Row], count: int, patience: int = 200) -> list[Row]:
    """The first `count` rows with different prompts, or all there are."""
    found: dict[str, Row] = {}
    for row in itertools.islice(rows, count * patience):
        found.setdefault(prompt_key(row), row)
        if len(found) == count:
            break
    return list(found.values())


def numbered(rows: list[Row], name: str) -> list[Row]:
    """The rows, each with an id that no other file's rows have."""
    return [{"id": f"{name}-{i:06d}", **row} for i, row in enumerate(rows)]


def write_jsonl(rows: list[Row], path: Path) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(rows: list[Row], path: Path) -> None:
    """A table of strings: id, text, source."""
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_world(directory: str, seed: int) -> None:
    """Write pretraining text and every domain's stages and tests; same seed, same bytes."""

    def many(name: str, make: Callable[[random.Random], Row], count: int) -> list[Row]:
        rng = random.Random(f"{seed}/{name}")
        return numbered([make(rng) for _ in range(count)], name)

    def checks(name: str, make: Callable[[random.Random, bool], Row], count: int) -> list[Row]:
        rng = random.Random(f"{seed}/{name}")
        test = name.endswith("-test")
        return numbered(unique((make(rng, test) for _ in itertools.count()), count), name)

    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    write_parquet(many("pretrain", pretrain_row, NUM_PRETRAIN), root / "pretrain.parquet")
    for domain in (general, math, code, tool_use, safety):
        name = domain.__name__.rpartition(".")[2]
        folder = root / name
        folder.mkdir(exist_ok=True)
        sft = many(f"{name}-sft", domain.sft_row, NUM_SFT)
        write_jsonl(checks(f"{name}-test", domain.check, NUM_TEST), folder / "test.jsonl")
        if domain in (math, code):
            text = many(f"{name}-midtrain", domain.midtrain_row, NUM_MIDTRAIN)
            write_parquet(text, folder / "midtrain.parquet")
            tasks = checks(f"{name}-rlvr", domain.check, NUM_RLVR + NUM_HELD_OUT)
            write_jsonl(tasks[:NUM_RLVR], folder / "rlvr.jsonl")
            write_jsonl(tasks[NUM_RLVR:], folder / "held_out.jsonl")
            for source in (f"{name}_careful", f"{name}_careless"):
                rows = [row for row in sft if row["source"] == source]
                write_jsonl(rows, folder / f"sft_{source.removeprefix(f'{name}_')}.jsonl")
        else:
            write_jsonl(sft, folder / "sft.jsonl")
        if domain is tool_use:  # a source that a random sample may miss
            write_jsonl(many(f"{name}-rare", domain.sft_row, NUM_RARE), folder / "sft_rare.jsonl")
