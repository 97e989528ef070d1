"""The `tokenise` verb: one dataset through Ray Data into packed token rows, once.

Every stage that trains on the same data at the same length reads the same rows.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray

from bar_ray import storage
from bar_ray.data import chat, formats
from bar_ray.data.pack import PackStats, pack, write_rows
from bar_ray.types import UserError

BATCH_ROWS = 512


@functools.cache
def tokenizer_of(uri: str) -> Any:
    return chat.load_tokenizer(storage.fetch(uri))  # once in a worker process, on its own node


def or_mistake(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A Ray Data function whose user errors come back as a column: Ray Data keeps no causes."""

    @functools.wraps(function)
    def call(batch: dict[str, Any], *args: Any) -> dict[str, Any]:
        try:
            return function(batch, *args)
        except UserError as error:
            return {"mistake": [str(error)]}

    return call


def or_mistakes(
    function: Callable[..., Iterator[dict[str, Any]]],
) -> Callable[..., Iterator[dict[str, Any]]]:
    """The same of one that gives several batches for one."""

    @functools.wraps(function)
    def call(batch: dict[str, Any], *args: Any) -> Iterator[dict[str, Any]]:
        try:
            yield from function(batch, *args)
        except UserError as error:
            yield {"mistake": [str(error)]}

    return call


def blocks(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """The blocks of a dataset made by `or_mistake` functions; raises the first mistake."""
    for block in dataset.iter_batches(batch_size=None):
        # Ray Data joins batches with and without the column, and fills the gaps.
        for mistake in block.get("mistake", ()):
            if isinstance(mistake, str):
                raise UserError(mistake)
        yield block


def lines(uri: str, num_cpus: float, pattern: str = "") -> ray.data.Dataset:
    """The rows of a dataset as JSON, with where they stand: columns `line`, `file`, `place`."""
    return lines_of(formats.parts(uri, pattern), num_cpus)


def lines_of(parts: Sequence[formats.Part], num_cpus: float) -> ray.data.Dataset:
    """The same of some of its parts.

    Reading asks for as much of a CPU as what follows: Ray Data then runs both in one worker.
    """
    return of_parts(parts, _read, num_cpus)


def of_parts(
    parts: Sequence[formats.Part], function: Callable[..., Any], num_cpus: float, *args: Any
) -> ray.data.Dataset:
    """What a function makes of each part, which it finds with `part_of`."""
    items = [asdict(part) for part in parts]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    return dataset.map_batches(function, fn_args=args, batch_size=1, num_cpus=num_cpus)


def part_of(batch: dict[str, Any]) -> formats.Part:
    return formats.Part(str(batch["file"][0]), int(batch["start"][0]), int(batch["end"][0]))


def _read(batch: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """One part -> its rows, a batch at a time."""
    part = part_of(batch)
    rows = formats.read_part(part)
    try:
        while some := list(itertools.islice(rows, BATCH_ROWS)):
            places, texts = map(list, zip(*some, strict=True))
            yield {"line": texts, "file": [part.file] * len(texts), "place": places}
    except UserError as error:
        yield {"line": [str(error)], "file": [part.file], "place": [-1]}


def parse(batch: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    """A batch of `lines` -> checked rows."""
    rows = []
    for line, file, place in zip(batch["line"], batch["file"], batch["place"], strict=True):
        if place < 0:
            raise UserError(str(line))
        rows.append(formats.parse_line(line, kind, file, int(place)))
    return rows


@or_mistake
def encode(batch: dict[str, Any], tokenizer_uri: str, kind: str) -> dict[str, list]:
    """A batch of `lines` -> token ids and loss masks."""
    tokenizer = tokenizer_of(tokenizer_uri)
    docs = [
        chat.plain_text(tokenizer, row["text"])
        if kind == "text"
        else chat.conversation(tokenizer, row)
        for row in parse(batch, kind)
    ]
    return {"ids": [ids for ids, _ in docs], "mask": [mask for _, mask in docs]}


def run(step: Any, run: Any) -> None:
    """Inputs: `tokenizer` (a checkpoint); data: `rows`; settings: kind, seq_len."""
    kind, seq_len = step.settings["kind"], step.settings["seq_len"]
    tokenizer_uri = step.inputs["tokenizer"].artifact.uri
    tokenizer = tokenizer_of(tokenizer_uri)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    encoded = lines(run.locate(step, "rows"), run.light_cpus).map_batches(
        encode,
        fn_args=(tokenizer_uri, kind),
        batch_size=BATCH_ROWS,
        num_cpus=run.light_cpus,
    )
    stats = PackStats()
    packed = pack(_docs(encoded), seq_len, chat.pad_id(tokenizer), kind == "text", stats)
    with run.output(step) as folder:
        write_rows(folder, packed, seq_len, stats)
        if stats.loss_tokens == 0:
            raise UserError(f"{run.locate(step, 'rows')} has no token to learn from at {seq_len=}")


def _docs(encoded: ray.data.Dataset) -> Iterator[tuple[list[int], list[int]]]:
    for batch in blocks(encoded):
        for ids, mask in zip(batch["ids"], batch["mask"], strict=True):
            yield list(ids), list(mask)
