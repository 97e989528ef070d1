"""The `sample` verb: an exact stratified sample of every SFT source with Ray Data.

A row's place in the order is the hash of its content, so the sample does not depend on file layout,
row order or parallelism, and a larger fraction contains a smaller one. No shuffle: one pass brings
every hash and the lines of low ones, twice as many as are wanted; only when a stratum is so small
that it lacks some of its own does a second pass bring those. A stratum is a dataset of the recipe,
and within it a value of the rows' `source` column.
"""

import contextlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import ray
import xxhash

from bar_ray.data import formats, rows, tokenise

MOST_ROWS = 65_536  # hashed before they are handed on
HASHES = 2**62
SPARE = 2  # lines read at once over those wanted


def content_hash(line: str, seed: int) -> int:
    """62 bits of a hash of a row's content, whatever the order of its keys."""
    try:
        row = orjson.loads(line)
    except ValueError:
        row = formats.decoded(line)  # Python reads more: NaN, and it says what is wrong
    return int(_numbers([xxhash.xxh3_64_digest(_canonical(row), _unsigned(seed))])[0])


def _canonical(row: Any) -> bytes:
    try:
        return orjson.dumps(row, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits
        return json.dumps(row, sort_keys=True, ensure_ascii=False).encode(errors="surrogatepass")


def _unsigned(seed: int) -> int:
    return seed % 2**64


def _numbers(digests: Sequence[bytes]) -> np.ndarray:
    return (np.frombuffer(b"".join(digests), dtype=">u8") >> 2).astype(np.int64)


def _bound(limit: int) -> bytes:
    """The largest digest of a hash that is at most the limit: digests sort as their numbers do."""
    return b"" if limit < 0 else (min(limit, HASHES - 1) << 2 | 3).to_bytes(8, "big")


@tokenise.or_mistakes
def hashed(
    batch: dict[str, Any], seed: int, limit: int, limits: Mapping[str, int]
) -> Iterator[dict[str, list]]:
    """A part -> a row per stratum: all hashes, and the lines whose hash is at most its limit.

    A part's bytes are read, parsed and hashed here, and lines travel as one text: what is done for
    every row is all the time that this takes.
    """
    part, seed, most = tokenise.part_of(batch), _unsigned(seed), _bound(limit)
    bounds = {stratum: _bound(each) for stratum, each in limits.items()}
    lines = formats.read_bytes(part)
    while True:
        digests: dict[str, list[bytes]] = defaultdict(list)
        low: dict[str, list[bytes]] = defaultdict(list)
        for place, line in itertools.islice(lines, MOST_ROWS):
            try:  # calls of functions of ours would be a tenth of the time
                row = orjson.loads(line)
                canonical = orjson.dumps(row, option=orjson.OPT_SORT_KEYS)
            except (ValueError, TypeError):
                row = _row(line, part.file, place)
                canonical = _canonical(row)
            if not isinstance(row, dict):
                row = _row(line, part.file, place)
            digest, stratum = xxhash.xxh3_64_digest(canonical, seed), str(row.get("source", ""))
            digests[stratum].append(digest)
            if digest <= bounds.get(stratum, most):
                low[stratum].append(line)
        if not digests:
            return
        yield {
            "stratum": [*digests],
            "hashes": [_numbers(each).tobytes() for each in digests.values()],
            "lines": [b"\n".join(low[stratum]) for stratum in digests],
        }


def _row(line: bytes, file: str, place: int) -> dict[str, Any]:
    """What Python reads of a line, which is more: NaN and large integers; UserError if no row."""
    with contextlib.suppress(rows.WrongRow):
        row = formats.decoded(formats.as_text(line))
        if isinstance(row, dict):
            return row
    return formats.parse_line(formats.as_text(line), "messages", file, place)  # says what is wrong


@dataclass
class Stratum:
    """Hashes of all rows, and the lines of low ones."""

    parts: list[np.ndarray] = field(default_factory=list)
    low: list[tuple[int, str]] = field(default_factory=list)

    @property
    def hashes(self) -> np.ndarray:
        return np.concatenate(self.parts)


def strata(uri: str, seed: int, limit: int, limits: Mapping[str, int]) -> dict[str, Stratum]:
    """The rows of a dataset by stratum; lines where the hash is at most the limit."""
    found: dict[str, Stratum] = defaultdict(Stratum)
    made = tokenise.of_parts(formats.parts(uri), hashed, seed, limit, limits)
    for block in tokenise.blocks(made):
        columns = block["stratum"], block["hashes"], block["lines"]
        for name, hashes, lines in zip(*columns, strict=True):
            numbers, stratum = np.frombuffer(hashes, dtype=np.int64), found[str(name)]
            stratum.parts.append(numbers)
            low = numbers[numbers <= limits.get(str(name), limit)].tolist()
            stratum.low += zip(low, lines.decode().split("\n") if low else (), strict=True)
    return found


def thresholds(strata: Mapping[str, np.ndarray], fraction: float) -> dict[str, tuple[int, int]]:
    """Stratum -> (largest hash kept, number of rows kept): exactly ceil(fraction * rows)."""
    found = {}
    for stratum, hashes in strata.items():
        count = math.ceil(fraction * len(hashes))
        found[stratum] = (int(np.partition(hashes, count - 1)[count - 1]), count)
    return found


def _limit(fraction: float) -> int:
    return min(HASHES, int(HASHES * fraction * SPARE))


def stratified(uri: str, fraction: float, seed: int) -> list[str]:
    """The sampled lines of a dataset, by stratum and hash; exact in every stratum."""
    limit = _limit(fraction)
    found = strata(uri, seed, limit, {})
    wanted = thresholds({name: each.hashes for name, each in found.items()}, fraction)
    lacking = {name: largest for name, (largest, _) in wanted.items() if largest > limit}
    if lacking:
        more = strata(uri, seed, -1, lacking)
        found |= {name: more[name] for name in lacking}
    # Rows with equal content have equal hashes: the count cuts them to the exact number.
    return [line for name in sorted(found) for line in _lowest(found[name].low, wanted[name][1])]


def at_random(uris: list[str], fraction: float, seed: int) -> list[str]:
    """The sampled lines of all datasets taken as one: small ones get what falls to them."""
    limit = _limit(fraction)
    while True:
        known = [strata(uri, seed, limit, {}) for uri in uris]
        everything = [each for found in known for each in found.values()]
        hashes = {"": np.concatenate([each.hashes for each in everything])}
        largest, count = thresholds(hashes, fraction)[""]
        if largest <= limit:
            return _lowest([row for each in everything for row in each.low], count)
        limit = largest


def _lowest(rows: list[tuple[int, str]], count: int) -> list[str]:
    return [line for _, line in sorted(rows)[:count]]


def run(step: Any, run: Any) -> None:
    """Data: SFT sources by name; settings: fraction, seed, stratified, natural.

    Output: `<name>.jsonl` of each, or one `all.jsonl` of all (`natural`), and counts.
    """
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    settings = step.settings
    options = settings["fraction"], settings["seed"]
    counts: dict[str, int] = {}
    with run.output(step, counts) as folder:
        if settings["stratified"]:
            sampled = {name: stratified(run.locate(step, name), *options) for name in step.data}
        else:
            uris = [run.locate(step, name) for name in step.data]
            sampled = {"all": at_random(uris, *options)}
        if settings["natural"]:
            sampled = {"all": [line for lines in sampled.values() for line in lines]}
        for name, lines in sampled.items():
            Path(folder, f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
            counts[f"rows:{name}"] = len(lines)
