"""The `tokenise` verb: one dataset through Ray Data into packed token rows, once.

Every stage that trains on the same data at the same length reads the same rows.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import ray

from bar_ray import storage
from bar_ray.data import chat, formats
from bar_ray.data.pack import PackStats, pack, write_rows
from bar_ray.types import UserError

BATCH_ROWS = 512


@functools.cache
def _tokenizer(folder: str) -> Any:
    return chat.load_tokenizer(folder)  # once in a worker process


def or_mistake(function: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """A Ray Data function whose user errors come back as a column: Ray Data keeps no causes."""

    @functools.wraps(function)
    def call(batch: dict[str, Any], *args: Any) -> dict[str, Any]:
        try:
            return function(batch, *args)
        except UserError as error:
            return {"mistake": [str(error)]}

    return call


def blocks(dataset: ray.data.Dataset) -> Iterator[dict[str, Any]]:
    """The blocks of a dataset made by `or_mistake` functions; raises the first mistake."""
    for block in dataset.iter_batches(batch_size=None):
        if "mistake" in block:
            raise UserError(str(block["mistake"][0]))
        yield block


@or_mistake
def encode(batch: dict[str, Any], tokenizer_folder: str, kind: str) -> dict[str, list]:
    """A batch of rows or lines -> token ids and loss masks."""
    tokenizer = _tokenizer(tokenizer_folder)
    docs = [
        chat.plain_text(tokenizer, row["text"])
        if kind == "text"
        else chat.conversation(tokenizer, row)
        for row in _rows(batch, kind)
    ]
    return {"ids": [ids for ids, _ in docs], "mask": [mask for _, mask in docs]}


def _rows(batch: dict[str, Any], kind: str) -> Iterator[dict[str, Any]]:
    if "line" in batch:
        for line, file in zip(batch["line"], batch["file"], strict=True):
            yield parse(line, kind, file)
    else:
        for values in zip(*batch.values(), strict=True):
            yield formats.check_row(dict(zip(batch, values, strict=True)), kind, "a parquet row")


def parse(line: str, kind: str, file: str) -> dict[str, Any]:
    """A JSONL line as a row; the line number is looked up only when it is needed."""
    try:
        return formats.parse_line(line, kind, file)
    except UserError as error:
        where = f"{file} line {formats.line_of(file, line)}"
        raise UserError(str(error).replace(file, where, 1)) from error


def lines(uri: str, num_cpus: float) -> ray.data.Dataset:
    """The JSONL lines of a file or folder with the file they stand in: columns `line`, `file`.

    Reading asks for as much of a CPU as what follows: Ray Data then runs both in one worker.
    """
    found = formats.files(uri)
    filesystem, _ = storage.resolve(found[0])
    uri_of = {storage.resolve(file)[1]: file for file in found}
    dataset = ray.data.read_text(
        list(uri_of),
        filesystem=filesystem,
        include_paths=True,
        drop_empty_lines=True,
        num_cpus=num_cpus,
    )

    def name(batch: dict[str, Any]) -> dict[str, Any]:
        known = [next(u for p, u in uri_of.items() if path.endswith(p)) for path in batch["path"]]
        return {"line": batch["text"], "file": known}

    return dataset.map_batches(name, num_cpus=num_cpus)


def rows(uri: str, kind: str, num_cpus: float) -> ray.data.Dataset:
    """A dataset of lines (JSONL) or of columns (parquet)."""
    found = formats.files(uri)
    if not found[0].endswith(".parquet"):
        return lines(uri, num_cpus)
    filesystem, _ = storage.resolve(found[0])
    paths = [storage.resolve(file)[1] for file in found]
    return ray.data.read_parquet(
        paths, filesystem=filesystem, columns=list(formats.NEEDED[kind]), num_cpus=num_cpus
    )


def run(step: Any, run: Any) -> None:
    """Inputs: `tokenizer` (a checkpoint); data: `rows`; settings: kind, seq_len."""
    kind, seq_len = step.settings["kind"], step.settings["seq_len"]
    tokenizer_folder = run.fetch(step.inputs["tokenizer"])
    tokenizer = chat.load_tokenizer(tokenizer_folder)
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    encoded = rows(run.locate(step, "rows"), kind, run.light_cpus).map_batches(
        encode,
        fn_args=(tokenizer_folder, kind),
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
