"""The `check` verb: what a dataset would be in training, and every fault of its rows.

A faulty dataset gives a finished report, not a failed step: all faults at once, by file, row and
field, instead of the first one after an hour.
"""

import heapq
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import ray
from jinja2 import TemplateError

from bar_ray import rewards, storage
from bar_ray.data import chat, formats, rows, sample, tokenise
from bar_ray.data.prepare import LeftOut, answers_of, renamed
from bar_ray.data.rows import Fault, Row
from bar_ray.recipe import Dataset
from bar_ray.types import UserError

Candidate = tuple[int, str, int, str]  # content hash, file, place, line
SAMPLES = 3
MOST_FAULTS = 1000  # written down; all are counted


@dataclass
class Report:
    """What was found in one dataset, as one use of it sees it."""

    name: str
    kind: str
    uri: str
    rows: int = 0
    tokens: int = 0
    learned: int = 0  # tokens that count in the loss
    longest: int = 0
    too_long: int = 0  # more tokens than `seq_len`: texts are cut, conversations dropped
    duplicates: int = 0  # rows with the content of another one
    num_faults: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)  # where, field, problem
    samples: list[dict[str, Any]] = field(default_factory=list)  # where, spans of (text, learned)

    @property
    def summary(self) -> str:
        parts = [f"{self.rows:,} rows", f"{self.tokens:,} tokens", f"longest {self.longest:,}"]
        if self.kind == "messages" and self.tokens:
            parts.insert(2, f"{self.learned / self.tokens:.0%} of them learned from")
        for count, what in ((self.too_long, "too long"), (self.duplicates, "duplicates")):
            parts += [f"{count:,} {what}"] * bool(count)
        return ", ".join([*parts, f"{self.num_faults:,} faults" if self.num_faults else "no fault"])


def faults_of(
    line: str, dataset: Dataset, kind: str, tokenizer: Any, answers: Mapping[str, Row]
) -> tuple[list[Fault], Any]:
    """Faults of a line; without any, its tokens and loss mask."""
    try:
        row = rows.normalised(renamed(formats.decoded(line), dataset, answers), kind)
    except rows.WrongRow as error:
        return [Fault("", str(error))], None
    found = list(rows.faults(row, kind))
    if kind == "prompts" and not found:
        try:
            rewards.validate(row["verifier"], row.get("ground_truth"))
        except UserError as error:
            field = "ground_truth" if row["verifier"] in rewards.NAMES else "verifier"
            found = [Fault(field, f"cannot be used: {error}")]
    if found:
        return found, None
    try:
        ids, mask = encode(tokenizer, row, kind)
    except (TemplateError, TypeError, ValueError) as error:
        return [Fault("messages", f"cannot be rendered by the chat template: {error}")], None
    if not any(mask) and kind != "prompts":
        problem = "has nothing to learn from: no token of it is an assistant's"
        return [Fault(kind, problem)], None
    return [], (ids, mask)


def encode(tokenizer: Any, row: rows.Row, kind: str) -> tuple[list[int], list[int]]:
    """Token ids and loss mask, as training has them."""
    if kind == "text":
        return chat.plain_text(tokenizer, row["text"])
    if kind == "messages":
        return chat.conversation(tokenizer, row)
    ids = chat.prompt(tokenizer, row)
    return ids, [0] * len(ids)


def looked_at(
    batch: dict[str, Any], dataset: Dataset, kind: str, tokenizer_uri: str, answers: Any
) -> dict[str, list]:
    """Lines -> counts of each, its faults as JSON, and the lines that may be shown as samples."""
    tokenizer, answers = tokenise.tokenizer_of(tokenizer_uri), ray.get(answers)
    out: dict[str, list] = {n: [] for n in ("tokens", "learned", "hash", "faults", "sample")}
    out |= {"line": [], "file": [], "place": []}
    for line, file, place in zip(*(batch[n] for n in ("line", "file", "place")), strict=True):
        line = str(line)
        try:
            if place < 0:  # the file could not be read on
                found, tokens = [Fault("", line)], None
            else:
                found, tokens = faults_of(line, dataset, kind, tokenizer, answers)
        except LeftOut:
            continue
        for name, value in (("line", line), ("file", file), ("place", place)):
            out[name].append(value)
        ids, mask = tokens or ([], [])
        out["tokens"].append(len(ids))
        out["learned"].append(sum(mask))
        out["hash"].append(-1 if found else sample.content_hash(line, 0))
        out["faults"].append(json.dumps([vars(fault) for fault in found]) if found else "")
    lowest = sorted(value for value in out["hash"] if value >= 0)[:SAMPLES]
    pairs = zip(out.pop("line"), out["hash"], strict=True)
    out["sample"] = [line if value in lowest else "" for line, value in pairs]
    return out


def run(step: Any, run: Any) -> None:
    """Inputs: `tokenizer`; data: `rows`, `answers` if there are; settings: dataset, kind, seq_len.

    Output: report.json.
    """
    settings, uri = step.settings, run.locate(step, "rows")
    dataset, kind = settings["dataset"], settings["kind"]
    tokenizer_uri = step.inputs["tokenizer"].artifact.uri
    report = Report(step.name, kind, uri)
    answers = answers_of(step, run)
    with run.output(step) as folder:
        parts = list(_parts(formats.files(uri, dataset.files), report))
        beside = dataset, kind, tokenizer_uri, ray.put(answers)
        blocks = tokenise.blocks(tokenise.of_rows(parts, looked_at, *beside)) if parts else ()
        samples = _tally(report, blocks, settings["seq_len"])
        if not report.rows and not report.faults:
            _add(report, uri, -1, Fault("", "holds no row"))
        _name_lines(report)
        made = [renamed(formats.decoded(each[-1]), dataset, answers) for each in samples]
        pairs = zip(samples, made, strict=True)
        report.samples = [_rendered(*each[1:3], row, kind, tokenizer_uri) for each, row in pairs]
        Path(folder, "report.json").write_text(json.dumps(vars(report), ensure_ascii=False))


def _parts(files: Iterable[str], report: Report) -> Iterator[formats.Part]:
    """Of the files that can be opened; the others are faults."""
    for file in files:
        try:
            yield from formats.parts(file)
        except UserError as error:
            _add(report, file, -1, Fault("", str(error)))


def _add(report: Report, file: str, place: int, fault: Fault) -> None:
    report.num_faults += 1
    if len(report.faults) < MOST_FAULTS:
        report.faults.append({"file": file, "place": place, **vars(fault)})


def _tally(report: Report, blocks: Iterable[dict[str, Any]], seq_len: int) -> list[Candidate]:
    """Count what the blocks hold; returns the rows to show as samples."""
    best: list[Candidate] = []
    hashes = [np.empty(0, np.int64)]
    for block in blocks:
        tokens, good = np.asarray(block["tokens"]), np.asarray(block["hash"]) >= 0
        report.rows += len(tokens)
        report.tokens += int(tokens.sum())
        report.learned += int(np.sum(block["learned"]))
        report.longest = max(report.longest, int(tokens.max(initial=0)))
        report.too_long += int((tokens > seq_len).sum())
        hashes.append(np.asarray(block["hash"])[good])
        for file, place, faults in zip(block["file"], block["place"], block["faults"], strict=True):
            for each in json.loads(faults or "[]"):
                _add(report, str(file), int(place), Fault(**each))
        shown = zip(block["hash"], block["file"], block["place"], block["sample"], strict=True)
        best += [(int(h), str(f), int(p), str(s)) for h, f, p, s in shown if s]
        best = heapq.nsmallest(SAMPLES, best)
    every = np.concatenate(hashes)
    report.duplicates = len(every) - len(np.unique(every))
    return best


def _name_lines(report: Report) -> None:
    """Places become the numbers people count by, each file read once."""
    places: dict[str, list[int]] = {}
    for fault in report.faults:
        places.setdefault(fault["file"], []).append(fault["place"])
    names = {file: formats.named(file, found) for file, found in places.items()}
    for fault in report.faults:
        file, place = fault.pop("file"), fault.pop("place")
        fault["where"] = names[file].get(place, file)


def _rendered(file: str, place: int, row: Any, kind: str, tokenizer_uri: str) -> dict[str, Any]:
    """A sample as the model sees it: where it stands, and its text in spans (text, learned)."""
    tokenizer = tokenise.tokenizer_of(tokenizer_uri)
    ids, mask = encode(tokenizer, rows.normalised(row, kind), kind)
    together = itertools.groupby(zip(ids, mask, strict=True), key=lambda pair: bool(pair[1]))
    spans = [(tokenizer.decode([token for token, _ in pairs]), on) for on, pairs in together]
    return {"where": formats.where(file, place), "spans": spans}


# --- for people -----------------------------------------------------------------------------------

SHOWN_FAULTS = 20
SHOWN_CHARACTERS = 2000
LEARNED = ("\x1b[32m", "\x1b[0m")  # green
MARKS = (">>", "<<")


def read(step: Any) -> Report:
    """The report of a finished check."""
    return Report(**json.loads(Path(storage.fetch(step.artifact.uri), "report.json").read_text()))


def render(report: Report, colour: bool = False) -> str:
    """Counts, faults and samples, as text."""
    lines = [f"\n{report.name} ({report.kind}): {report.summary}", f"  {report.uri}"]
    for fault in report.faults[:SHOWN_FAULTS]:
        lines.append(f"  {fault['where']}: {Fault(fault['field'], fault['problem'])}")
    if (more := report.num_faults - SHOWN_FAULTS) > 0:
        lines.append(f"  and {more:,} more faults")
    for shown in report.samples:
        text = "".join(_span(text, learned, colour) for text, learned in shown["spans"])
        lines += [f"  --- {shown['where']}", _cut(text)]
    return "\n".join(lines)


def _span(text: str, learned: bool, colour: bool) -> str:
    start, end = LEARNED if colour else MARKS
    return f"{start}{text}{end}" if learned else text


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]} ..."
