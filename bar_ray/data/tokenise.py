"""The `tokenise` verb: one dataset through Ray Data into packed token rows, once.

Every stage that trains on the same data at the same length reads the same rows.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from typing import Any

import ray
import ray.data
from ray.data._internal.execution.resource_manager import ResourceManager

from bar_ray import storage
from bar_ray.data import chat, formats
from bar_ray.data.pack import PackStats, pack, write_rows
from bar_ray.types import UserError

BATCH_ROWS = 512
LIGHT = 0.01  # CPUs of a task that reads and writes

# Ray Data learns what it may use by asking once a second, from nothing: until the second time one
# task runs at once, however large the cluster is.
ResourceManager.GLOBAL_LIMITS_UPDATE_INTERVAL_S = 0.1


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


def of_rows(
    parts: Sequence[formats.Part], function: Callable[..., Any], *args: Any
) -> ray.data.Dataset:
    """What a function makes of the rows of parts: a batch has columns `line`, `file`, `place`.

    A line is a row as JSON. Both tasks ask for the same, so Ray Data runs them in one worker.
    """
    tasks = light_tasks(len(parts))
    return _of_parts(parts, _read, (), tasks).map_batches(
        function, fn_args=args, batch_size=BATCH_ROWS, **tasks
    )


def of_parts(
    parts: Sequence[formats.Part], function: Callable[..., Any], *args: Any
) -> ray.data.Dataset:
    """What a function makes of each part, which it finds with `part_of`."""
    return _of_parts(parts, function, args, light_tasks(len(parts)))


def _of_parts(
    parts: Sequence[formats.Part],
    function: Callable[..., Any],
    args: tuple[Any, ...],
    tasks: dict[str, Any],
) -> ray.data.Dataset:
    items = [asdict(part) for part in parts]
    dataset = ray.data.from_items(items, override_num_blocks=len(items))
    return dataset.map_batches(function, fn_args=args, batch_size=1, **tasks)


def light_tasks(wanted: int) -> dict[str, Any]:
    """Options of at most so many tasks that read and write.

    They ask for next to nothing, so that none has to wait for trainings which hold every CPU; and
    they are at most two to a CPU, as Ray Data takes a while to start one when another has ended.
    """
    if not (cpus := _num_cpus()):
        ray.get(_begun.remote())  # the first node of a cluster that begins with none
        cpus = _num_cpus()
    most = max(1, min(wanted, math.ceil(2 * cpus)))
    return {"num_cpus": LIGHT, "compute": ray.data.TaskPoolStrategy(size=most)}


def _num_cpus() -> float:
    return ray.cluster_resources().get("CPU", 0.0)


@ray.remote(num_cpus=LIGHT)
def _begun() -> None: ...


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
    """A batch of `of_rows` -> checked rows."""
    rows = []
    for line, file, place in zip(batch["line"], batch["file"], batch["place"], strict=True):
        if place < 0:
            raise UserError(str(line))
        rows.append(formats.parse_line(line, kind, file, int(place)))
    return rows


@or_mistake
def encode(batch: dict[str, Any], tokenizer_uri: str, kind: str) -> dict[str, list]:
    """A batch of `of_rows` -> token ids and loss masks."""
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
    parts = formats.parts(run.locate(step, "rows"))
    encoded = of_rows(parts, encode, tokenizer_uri, kind)
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
