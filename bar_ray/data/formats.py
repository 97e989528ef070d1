"""Rows as users have them, checked with file and line.

Parquet and JSONL only. Mid-training rows have `text`; SFT rows have `messages` (with `tools` and
`tool_calls` where tools are used); RLVR and test rows have `messages`, `verifier`, `ground_truth`.
JSONL is parsed line by line: a columnar reader would merge the arguments of different tools into
one struct and fill the gaps with nulls.
"""

import json
from collections.abc import Iterator
from typing import Any

import pyarrow.parquet as pq

from bar_ray import storage
from bar_ray.types import UserError

NEEDED = {
    "text": {"text": str},
    "messages": {"messages": list},
    "prompts": {"messages": list, "verifier": str},
}


def read_rows(uri: str, kind: str) -> Iterator[dict[str, Any]]:
    """Checked rows of a file or folder, in file order."""
    for file in files(uri):
        if file.endswith(".parquet"):
            yield from _parquet_rows(file, kind)
        else:
            for number, line in enumerate(storage.read_bytes(file).decode().splitlines(), 1):
                if line.strip():
                    yield parse_line(line, kind, f"{file} line {number}")


def _parquet_rows(file: str, kind: str) -> Iterator[dict[str, Any]]:
    filesystem, path = storage.resolve(file)
    with pq.ParquetFile(path, filesystem=filesystem) as reader:
        number = 0
        for batch in reader.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield check_row(row, kind, f"{file} row {number}")


def files(uri: str) -> list[str]:
    """The parquet and JSONL files of a URI, sorted; a UserError when there are none."""
    found = [uri] if uri.endswith((".parquet", ".jsonl")) else storage.list_files(uri, True)
    found = sorted(f for f in found if f.endswith((".parquet", ".jsonl")))
    if not found or not all(storage.exists(file) for file in found):
        raise UserError(f"no dataset at {uri}: give a .parquet or .jsonl file, or a folder of them")
    return found


def parse_line(line: str, kind: str, where: str) -> dict[str, Any]:
    """One JSONL line as a checked row."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON: {error}") from error
    return check_row(row, kind, where)


def check_row(row: Any, kind: str, where: str) -> dict[str, Any]:
    """Refuse a row without the fields its kind needs."""
    if not isinstance(row, dict):
        raise UserError(f"{where} must be an object with {', '.join(NEEDED[kind])}")
    for name, wanted in NEEDED[kind].items():
        if not isinstance(row.get(name), wanted):
            has = ", ".join(row) or "nothing"
            raise UserError(f"{where} has no `{name}` ({wanted.__name__}); it has {has}")
    for message in row.get("messages") or ():
        if not isinstance(message, dict) or "role" not in message:
            raise UserError(f"{where}: every message needs a `role` and `content`")
    return row


def line_of(uri: str, text: str) -> int:
    """The line number of a line in a file, for error messages."""
    lines = storage.read_bytes(uri).decode().splitlines()
    return lines.index(text) + 1 if text in lines else 0
