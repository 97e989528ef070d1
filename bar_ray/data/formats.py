"""Files as users have them, read in parts, with the place of every row.

Parquet, Arrow files as `datasets` saves them, and JSONL, also compressed (`.gz`, `.zst`). JSONL is
parsed line by line: a columnar reader would merge the arguments of different tools into one struct
and fill the gaps with nulls. Files that did so are rid of their nulls.

`.json` (lines too, or one array, which is read whole), `.csv` and `.tsv` (every field a text) are
taken when they are named: in folders of datasets they often are something else.
"""

import csv
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from bar_ray import storage
from bar_ray.data import rows
from bar_ray.data.rows import Row
from bar_ray.log import some
from bar_ray.types import UserError

PART_BYTES = 64 << 20
CHUNK = 4 << 20
NO_END = 1 << 62  # of what is compressed: its size is not known
COLUMNAR = (".parquet", ".arrow")
PACKED = (".jsonl.gz", ".jsonl.zst")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
BOM = b"\xef\xbb\xbf"
NO_TEXT = "\0"  # no JSON begins with it
SUFFIXES = (*COLUMNAR, ".jsonl", *PACKED)
NAMED = (".json", *DELIMITERS)
LONGEST_FIELD = 1 << 30  # of a .csv; its reader's own limit is 128 KiB


@dataclass(frozen=True)
class Part:
    """A piece of a file that one worker reads: bytes of JSONL, or row groups of parquet.

    A JSONL part holds the lines that begin in it. Other files are a part each.
    """

    file: str
    start: int
    end: int


def ends_with(file: str, *suffixes: str) -> bool:
    return file.partition("?")[0].endswith(suffixes)


def read_rows(uri: str, kind: str) -> Iterator[Row]:
    """Checked rows of a file or folder, in file order."""
    for part in parts(uri):
        for place, line in read_part(part):
            yield parse_line(line, kind, part.file, place)


def files(uri: str, pattern: str = "") -> list[str]:
    """The dataset files of a URI whose path below it matches, sorted; a UserError without any.

    Args:
        pattern: one or several, with commas between: `data/train-*, more/*.json`.
    """
    patterns = [each.strip() for each in pattern.split(",") if each.strip()]
    if ends_with(uri, *SUFFIXES, *NAMED):
        return _that_is_there(uri)
    root = storage.join(uri).partition("?")[0]
    there = storage.list_files(uri, recursive=True)
    below = {f: f.partition("?")[0].removeprefix(root).strip("/") for f in there}
    found = [file for file in below if ends_with(file, *SUFFIXES)]
    matching = [file for file in below if any(_matches(below[file], p) for p in patterns)]
    if not found and not matching:
        kinds = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
        raise UserError(
            f"no dataset at {uri}: give a {kinds} file, or a folder of them "
            f"({', '.join(NAMED)} by their names, or by `files`)"
        )
    if patterns and not matching:
        names = [below[file] for file in found]
        raise UserError(f"no file of {uri} matches {pattern}; there are {some(names)}")
    return matching if patterns else found


def _matches(name: str, pattern: str) -> bool:
    """Whether a file is one of a pattern's; some must be named down to their suffix."""
    plain = name.endswith(SUFFIXES)
    named = any(name.endswith(suffix) and pattern.endswith(suffix) for suffix in NAMED)
    return (plain or named) and fnmatch(name, pattern)


def _that_is_there(file: str) -> list[str]:
    if not storage.exists(file):
        raise UserError(f"no dataset at {file}: there is no such file")
    return [file]


def parts(uri: str, pattern: str = "", part_bytes: int = PART_BYTES) -> list[Part]:
    """The pieces of a dataset, in order, of at most about the given size; equal ones of a file."""
    found = []
    for file in files(uri, pattern):
        with storage.explained("read", file):
            filesystem, path = storage.resolve(file)
            if ends_with(file, ".parquet"):
                with pq.ParquetFile(path, filesystem=filesystem) as reader:
                    bounds = _groups(reader.metadata, part_bytes)
            else:
                size = filesystem.get_file_info(path).size
                if not size:
                    bounds = []
                elif ends_with(file, *PACKED, ".arrow", *DELIMITERS) or _is_array(file):
                    bounds = [0, NO_END]
                else:
                    pieces = -(-size // part_bytes)
                    bounds = [size * piece // pieces for piece in range(pieces + 1)]
        found += [Part(file, *both) for both in itertools.pairwise(bounds)]
    return found


def _groups(metadata: pq.FileMetaData, part_bytes: int) -> list[int]:
    """Where parts of a parquet file begin, by row group, and its end; small groups go together."""
    bounds, size = [0], 0
    for group in range(metadata.num_row_groups):
        num_bytes = metadata.row_group(group).total_byte_size
        if size and size + num_bytes > part_bytes:
            bounds.append(group)
            size = 0
        size += num_bytes
    return [*bounds, metadata.num_row_groups] if metadata.num_row_groups else []


def read_part(part: Part) -> Iterator[tuple[int, str]]:
    """(place, row as JSON) of every row of a part.

    The place is a byte of a JSONL file (of its content when it is compressed), or the number of a
    row. What cannot be read as text is `NO_TEXT` and the reason: `parse_line` refuses it.
    """
    for place, line in read_bytes(part):
        yield place, as_text(line)


def read_bytes(part: Part) -> Iterator[tuple[int, bytes]]:
    """The same as UTF-8, as far as it is that: of JSONL the bytes that are there."""
    with storage.explained("read", part.file):
        if ends_with(part.file, *COLUMNAR):
            for place, row in _table_rows(part):
                text = json.dumps(without_nulls(row), ensure_ascii=False, default=str)
                yield place, text.encode()
        elif ends_with(part.file, *DELIMITERS):
            yield from enumerate(_delimited(part.file))
        elif _is_array(part.file):
            yield from enumerate(_array(part.file))
        else:
            with _opened(part.file) as source:
                yield from _lines(source, part)


def _table_rows(part: Part) -> Iterator[tuple[int, Row]]:
    filesystem, path = storage.resolve(part.file)
    if ends_with(part.file, ".arrow"):
        with filesystem.open_input_file(path) as source, pa.ipc.open_stream(source) as batches:
            yield from enumerate(row for batch in batches for row in batch.to_pylist())
        return
    with pq.ParquetFile(path, filesystem=filesystem) as reader:
        first = sum(reader.metadata.row_group(g).num_rows for g in range(part.start))
        batches = reader.iter_batches(row_groups=range(part.start, part.end))
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), first)


def without_nulls(value: Any) -> Any:
    """Without the fields that a column gave to every row because some have them."""
    if isinstance(value, dict):
        return {name: without_nulls(each) for name, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _is_array(file: str) -> bool:
    """Whether a .json file is one array, and not a row in each line."""
    if not ends_with(file, ".json"):
        return False
    with _opened(file) as source:
        return source.read(1024).removeprefix(BOM).lstrip()[:1] == b"["


def _array(file: str) -> Iterator[bytes]:
    with _opened(file) as source:
        content = source.read()
    try:
        found = json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}") from error
    yield from (json.dumps(row).encode() for row in found)


def _delimited(file: str) -> Iterator[bytes]:
    """Rows under the names of the first; an empty field is an empty text."""
    csv.field_size_limit(LONGEST_FIELD)
    [delimiter] = [each for suffix, each in DELIMITERS.items() if ends_with(file, suffix)]
    with _opened(file) as source, io.BufferedReader(source, CHUNK) as read:
        text = io.TextIOWrapper(read, "utf-8-sig", "surrogateescape", newline="")
        found = csv.reader(text, delimiter=delimiter, strict=True)
        try:
            names = next(found, [])
            if len({*names}) < len(names):
                raise UserError(f"{file}: a column is named twice, of {', '.join(names)}")
            yield from (_fields(names, row) for row in filter(None, found))
        except csv.Error as error:  # where the next row begins is not known
            raise UserError(f"{file} cannot be read: line {found.line_num}: {error}") from error


def _fields(names: list[str], row: list[str]) -> bytes:
    if len(row) != len(names):
        told = f"has {len(row)} fields, and the first row names {len(names)}"
        return f"{NO_TEXT}{told}".encode()
    text = json.dumps(dict(zip(names, row, strict=True)), ensure_ascii=False)
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        byte = ord(text[error.start]) - 0xDC00  # as it was escaped
        return f"{NO_TEXT}is not UTF-8 text: it has a byte 0x{byte:02x}".encode()


def _opened(file: str) -> pa.NativeFile:
    filesystem, path = storage.resolve(file)
    if ends_with(file, *PACKED):
        return filesystem.open_input_stream(path, compression="detect")
    return filesystem.open_input_file(path)


def _lines(source: Any, part: Part) -> Iterator[tuple[int, bytes]]:
    """The lines that begin in a part; only a line feed ends one (JSON may hold U+2028 raw)."""
    read, place = io.BufferedReader(source, CHUNK), part.start
    if place:  # the line running into this part belongs to the one before
        source.seek(place - 1)
        place += len(read.readline()) - 1
    elif read.peek(len(BOM)).startswith(BOM):
        place = len(read.read(len(BOM)))
    for line in read:
        if place >= part.end:
            return
        if not line.isspace():
            yield place, line.removesuffix(b"\n")
        place += len(line)


def as_text(line: bytes) -> str:
    """A line, or why it is none (`NO_TEXT`)."""
    try:
        return line.decode()
    except UnicodeDecodeError as error:
        return f"{NO_TEXT}is not UTF-8 text: {error.reason} at byte {error.start + 1} of it"


def where(file: str, place: int) -> str:
    """A row's file and number for people; the lines are counted only now."""
    return named(file, [place])[place]


def named(file: str, places: Iterable[int]) -> dict[int, str]:
    """The same for many rows of a file, which is read once; places below 0 are no rows."""
    wanted = sorted({place for place in places if place >= 0})
    if ends_with(file, *COLUMNAR, *DELIMITERS) or _is_array(file):
        return {place: f"{file} row {place + 1}" for place in wanted}
    found, number, at = {}, 1, 0
    with _opened(file) as source:
        for place in wanted:
            while at < place:
                chunk = source.read(min(CHUNK, place - at))
                number, at = number + chunk.count(b"\n"), at + len(chunk)
            found[place] = f"{file} line {number}"
    return found


def parse_line(line: str, kind: str, file: str, place: int) -> Row:
    """A row as JSON -> the checked row."""
    try:
        return rows.checked(decoded(line), kind)
    except rows.WrongRow as error:
        raise UserError(f"{where(file, place)}: {error}") from error


def decoded(line: str) -> Any:
    """The JSON of a line that `read_part` gave; WrongRow when it is none."""
    if line.startswith(NO_TEXT):
        raise rows.WrongRow(line.removeprefix(NO_TEXT))
    try:
        return json.loads(line)
    except ValueError as error:
        raise rows.WrongRow(f"is not valid JSON: {error}") from error
