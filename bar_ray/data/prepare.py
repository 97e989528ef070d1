"""The `prepare` verb: rows of somebody else's shape into ours, without those that repeat tests.

Ray Data reads, renames and checks them a block at a time; what is kept is written in order, in
files of bounded size. Memory does not grow with the dataset.
"""

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray

from bar_ray import plugin
from bar_ray.data import formats, rows, tokenise
from bar_ray.data.overlap import TestPrompts
from bar_ray.data.rows import Row
from bar_ray.recipe import Dataset, Decontaminate
from bar_ray.types import UserError

FILE_BYTES = 256 << 20
KEPT, FAULTY, UNWANTED = "", "faulty", "unwanted"
COPIED = "copied from "  # and the category
NONE: Mapping[str, Row] = {}


class LeftOut(Exception):
    """A row that its converter, or `where`, does not want."""


def answers_of(step: Any, run: Any) -> dict[str, Row]:
    """Rows of the files that go with a dataset's, by `id`: as large as they are, in memory."""
    found: dict[str, Row] = {}
    if "answers" not in step.data:
        return found
    for file in formats.files(run.locate(step, "answers"), step.settings["dataset"].files):
        for part in formats.parts(file):
            for place, line in formats.read_part(part):
                try:
                    name, row = _identified(line)
                    if found.setdefault(name, row) != row:
                        raise rows.WrongRow(f"`id` {name} has another answer before")
                except rows.WrongRow as error:
                    raise UserError(f"{formats.where(file, place)}: {error}") from error
    return found


def _identified(line: str) -> tuple[str, Row]:
    row = formats.decoded(line)
    if not isinstance(row, dict) or row.get("id") is None:
        raise rows.WrongRow("`id` is missing; an answer names the row that it belongs to")
    return str(row["id"]), row


def renamed(row: Any, dataset: Dataset, answers: Mapping[str, Row] = NONE) -> Any:
    """A row as `convert` makes it (or LeftOut), with our names for its fields.

    Args:
        answers: more fields of rows, by their `id`; those that a row has come first.
    """
    if not isinstance(row, dict):
        return row
    if answers:
        own = {name: value for name, value in row.items() if value is not None}
        row = {**row, **answers.get(str(row.get("id")), {}), **own}
    if any(str(_at(row, name)) not in wanted for name, wanted in dataset.where.items()):
        raise LeftOut
    found = _converted(row, dataset.convert) if dataset.convert else dict(row)
    for ours, theirs in dataset.columns.items():
        value = _at(row, theirs)
        found.pop(theirs, None)
        if value is not None:
            found[ours] = value
    if dataset.verifier:
        found.setdefault("verifier", dataset.verifier)
    return found


def _converted(row: dict[str, Any], converter: str) -> dict[str, Any]:
    function = plugin.load("converter", converter)
    try:
        found = function(row)
    except Exception as error:  # of any kind: it is the user's
        told = f"{type(error).__name__}: {error}"
        raise rows.WrongRow(f"cannot be converted by {converter}: {told}") from error
    if found is None:
        raise LeftOut
    if not isinstance(found, dict):
        raise UserError(
            f'the converter "{converter}" returned {found!r:.60}; it must return a row as a dict, '
            "or None to leave it out"
        )
    return dict(found)


def _at(row: Any, path: str) -> Any:
    """The field of that name or, with dots, within a field."""
    if not isinstance(row, dict) or path in row:
        return row.get(path) if isinstance(row, dict) else None
    head, _, rest = path.partition(".")
    return _at(row.get(head), rest) if rest else None


@tokenise.or_mistake
def prepared(
    batch: dict[str, Any],
    dataset: Dataset,
    kind: str,
    tests: TestPrompts | None,
    answers: Mapping[str, Row] = NONE,
) -> dict[str, list]:
    """Lines -> our lines, and for each what became of it (`KEPT`, `FAULTY`, `UNWANTED`, a copy)."""
    lines, fates = [], []
    for line, file, place in zip(batch["line"], batch["file"], batch["place"], strict=True):
        if place < 0:  # the file cannot be read on
            raise UserError(str(line))
        try:
            row = rows.checked(renamed(formats.decoded(str(line)), dataset, answers), kind)
        except rows.WrongRow as error:
            if dataset.faulty == "refuse":
                where = formats.where(str(file), int(place))
                raise UserError(f"{where}: {error}{_source(error, dataset)}") from error
            lines.append("")
            fates.append(FAULTY)
            continue
        except LeftOut:
            lines.append("")
            fates.append(UNWANTED)
            continue
        copied = tests.copied(row) if tests else ""
        lines.append(json.dumps(row, ensure_ascii=False))
        fates.append(COPIED + copied if copied else KEPT)
    return {"line": lines, "fate": fates}


def _source(error: rows.WrongRow, dataset: Dataset) -> str:
    """Where one of our fields comes from, when it has another name there."""
    named = [f"`{o}` is their `{t}`" for o, t in dataset.columns.items() if f"`{o}" in str(error)]
    return f" ({'; '.join(named)})" if named else ""


def run(step: Any, run: Any) -> None:
    """Data: `rows`, `answers` if there are, test prompts as `test:CATEGORY`.

    Settings: dataset, kind, decontaminate.

    Output: `rows/`, JSONL files; how many rows were kept and left out, in the manifest.
    """
    settings = step.settings
    dataset, kind = settings["dataset"], settings["kind"]
    answers = answers_of(step, run)
    beside = ray.put((_tests(step, run, settings["decontaminate"]), answers))
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    parts = formats.parts(run.locate(step, "rows"), dataset.files)
    made = tokenise.of_rows(parts, prepared_with, dataset, kind, beside)
    counts: Counter[str] = Counter()
    info: dict[str, Any] = {}
    with run.output(step, info) as folder:
        _write(Path(folder, "rows"), _kept(made, dataset.limit, counts))
        if not counts[KEPT]:
            raise UserError(f"{run.locate(step, 'rows')}: no row is left of {counts.total()}")
        info["rows"] = counts.pop(KEPT)
        info["left_out"] = dict(counts)


def prepared_with(
    batch: dict[str, Any], dataset: Dataset, kind: str, beside: Any
) -> dict[str, Any]:
    """The same with tests and answers from Ray's object store, where a node has them once."""
    return prepared(batch, dataset, kind, *ray.get(beside))


def _tests(step: Any, run: Any, settings: Decontaminate | None) -> TestPrompts | None:
    if settings is None:
        return None
    prompts = [
        (name.removeprefix("test:"), text)
        for name in step.data
        if name.startswith("test:")
        for row in formats.read_rows(run.locate(step, name), "prompts")
        for text in _asked(row)
    ]
    return TestPrompts(prompts, settings.ngram, settings.overlap)


def _asked(row: Mapping[str, Any]) -> Iterator[str]:
    """What a test asks: the last turn of the user."""
    asked = [m["content"] for m in row["messages"] if m["role"] == "user" and m.get("content")]
    yield from asked[-1:]


def _kept(made: ray.data.Dataset, limit: int, counts: Counter[str]) -> Iterator[str]:
    for block in tokenise.blocks(made):
        for line, fate in zip(block["line"], block["fate"], strict=True):
            counts[str(fate)] += 1
            if fate == KEPT:
                yield str(line)
            if limit and counts[KEPT] == limit:
                return


def _write(folder: Path, lines: Iterator[str]) -> None:
    """JSONL files of about `FILE_BYTES`, in order."""
    folder.mkdir()
    line = next(lines, None)
    for number in itertools.count():
        if line is None:
            return
        with open(folder / f"{number:05d}.jsonl", "wb") as file:
            while line is not None and file.tell() < FILE_BYTES:
                file.write(line.encode() + b"\n")
                line = next(lines, None)
