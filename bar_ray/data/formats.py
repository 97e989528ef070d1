"""Rows as users have them, checked with file and line.

Parquet and JSONL only. Mid-training rows have `text`; SFT rows have `messages` (with `tools` and
`tool_calls` where tools are used); RLVR and test rows have `messages`, `verifier`, `ground_truth`.
JSONL is parsed line by line: a columnar reader would merge the arguments of different tools into
one struct and fill the gaps with nulls.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from bar_ray import storage
from bar_ray.types import UserError

PART_BYTES = 64 << 20
CHUNK = 4 << 20
NEEDED = {
    "text": {"text": str},
    "messages": {"messages": list},
    "prompts": {"messages": list, "verifier": str},
}


SUFFIXES = (".parquet", ".jsonl")


@dataclass(frozen=True)
class Part:
    """A piece of a file that one worker reads: bytes of JSONL, or row groups of parquet.

    A JSONL part holds the lines that begin in it.
    """

    file: str
    start: int
    end: int

    @property
    def is_parquet(self) -> bool:
        return is_parquet(self.file)


def is_parquet(file: str) -> bool:
    return file.partition("?")[0].endswith(".parquet")


def read_rows(uri: str, kind: str) -> Iterator[dict[str, Any]]:
    """Checked rows of a file or folder, in file order."""
    for part in parts(uri):
        for place, line in read_part(part):
            yield parse_line(line, kind, part.file, place)


def files(uri: str) -> list[str]:
    """The parquet and JSONL files of a URI, sorted; a UserError when there are none."""

    def is_dataset(file: str) -> bool:
        return file.partition("?")[0].endswith(SUFFIXES)

    found = [uri] if is_dataset(uri) else storage.list_files(uri, True)
    found = sorted(filter(is_dataset, found))
    if not found or not all(storage.exists(file) for file in found):
        raise UserError(f"no dataset at {uri}: give a .parquet or .jsonl file, or a folder of them")
    return found


def parts(uri: str, part_bytes: int = PART_BYTES) -> list[Part]:
    """The pieces of a dataset, in order, of about the given size."""
    found = []
    for file in files(uri):
        filesystem, path = storage.resolve(file)
        if is_parquet(file):
            with pq.ParquetFile(path, filesystem=filesystem) as reader:
                groups = reader.num_row_groups
            found += [Part(file, group, group + 1) for group in range(groups)]
        else:
            size = filesystem.get_file_info(path).size
            starts = range(0, size, part_bytes)
            found += [Part(file, start, min(start + part_bytes, size)) for start in starts]
    return found


def read_part(part: Part) -> Iterator[tuple[int, str]]:
    """(place, row as JSON) of every row of a part.

    The place is a byte of a JSONL file, or a row of a row group of parquet.
    """
    filesystem, path = storage.resolve(part.file)
    if part.is_parquet:
        with pq.ParquetFile(path, filesystem=filesystem) as reader:
            first = sum(reader.metadata.row_group(g).num_rows for g in range(part.start))
            for batch in reader.iter_batches(row_groups=range(part.start, part.end)):
                for row in batch.to_pylist():
                    yield first, json.dumps(row, ensure_ascii=False, default=str)
                    first += 1
        return
    with filesystem.open_input_file(path) as source:
        yield from _lines(source, part)


def _lines(source: Any, part: Part) -> Iterator[tuple[int, str]]:
    """The lines that begin in a part; only a line feed ends one (JSON may hold U+2028 raw)."""
    place, rest = part.start, b""
    if place:  # the line running into this part belongs to the one before
        source.seek(place - 1)
        place -= 1
    skipping = bool(part.start)
    while chunk := source.read(CHUNK):
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            if not skipping and place < part.end and line.strip():
                yield place, _decoded(line, part.file, place)
            skipping = False
            place += len(line) + 1
            if place >= part.end:
                return
    if rest.strip() and not skipping:
        yield place, _decoded(rest, part.file, place)


def _decoded(line: bytes, file: str, place: int) -> str:
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{where(file, place)} is not UTF-8 text: {error.reason}") from error


def where(file: str, place: int) -> str:
    """A row's file and number for people; the lines are counted only now."""
    if is_parquet(file):
        return f"{file} row {place + 1}"
    filesystem, path = storage.resolve(file)
    number = 1
    with filesystem.open_input_file(path) as source:
        while place > 0:
            chunk = source.read(min(CHUNK, place))
            number, place = number + chunk.count(b"\n"), place - len(chunk)
    return f"{file} line {number}"


def parse_line(line: str, kind: str, file: str, place: int) -> dict[str, Any]:
    """A row as JSON -> the checked row."""
    try:
        return check_row(json.loads(line), kind)
    except (ValueError, WrongRow) as error:
        problem = error if isinstance(error, WrongRow) else f"is not valid JSON: {error}"
        raise UserError(f"{where(file, place)} {problem}") from error


def check_row(row: Any, kind: str) -> dict[str, Any]:
    """Refuse a row without the fields its kind needs."""
    if not isinstance(row, dict):
        raise WrongRow(f"must be an object with {', '.join(NEEDED[kind])}")
    for name, wanted in NEEDED[kind].items():
        if not isinstance(row.get(name), wanted):
            has = ", ".join(row) or "nothing"
            raise WrongRow(f"has no `{name}` ({wanted.__name__}); it has {has}")
    for message in row.get("messages") or ():
        if not isinstance(message, dict) or "role" not in message:
            raise WrongRow("has a message without `role`; each needs `role` and `content`")
    return row


class WrongRow(Exception):
    """What is wrong with a row, to be said behind where it stands."""
