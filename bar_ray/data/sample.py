"""The `sample` verb: an exact stratified sample of every SFT source with Ray Data.

A row's place in the order is the hash of its content, so the sample does not depend on file layout,
row order or parallelism, and a larger fraction contains a smaller one. No shuffle: one pass brings
every hash and the lines of low ones, twice as many as are wanted; only when a stratum is so small
that it lacks some of its own does a second pass bring those. A stratum is a dataset of the recipe,
and within it a value of the rows' `source` column.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import ray

from bar_ray.data import formats, rows, tokenise

BATCH_ROWS = 4096
HASHES = 2**62
SPARE = 2  # lines read at once over those wanted


def content_hash(line: str, seed: int) -> int:
    """62 bits of a hash of a row's content, whatever the order of its keys."""
    return _hash(_content(line), seed)


def _content(line: str) -> Any:
    try:
        return orjson.loads(line)
    except ValueError:
        return formats.decoded(line)  # Python reads more: NaN, and it says what is wrong


def _hash(row: Any, seed: int) -> int:
    try:
        canonical = orjson.dumps(row, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # an integer of more than 64 bits
        canonical = json.dumps(row, sort_keys=True, ensure_ascii=False).encode()
    digest = hashlib.blake2b(canonical, digest_size=8, salt=seed.to_bytes(8, "big", signed=True))
    return int.from_bytes(digest.digest(), "big") >> 2


@tokenise.or_mistake
def hashed(
    batch: dict[str, Any], seed: int, limit: int, limits: Mapping[str, int]
) -> dict[str, list]:
    """Lines -> a row per stratum: all hashes, and the lines whose hash is at most its limit."""
    hashes: dict[str, list[int]] = defaultdict(list)
    lines: dict[str, list[str]] = defaultdict(list)
    for line, file, place in zip(batch["line"], batch["file"], batch["place"], strict=True):
        try:
            row = _content(line)
            stratum = str(row.get("source", ""))
        except (rows.WrongRow, AttributeError):
            row = formats.parse_line(line, "messages", file, int(place))  # says what is wrong
            stratum = str(row.get("source", ""))
        number = _hash(row, seed)
        hashes[stratum].append(number)
        if number <= limits.get(stratum, limit):
            lines[stratum].append(line)
    return {
        "stratum": [*hashes],
        "hashes": [np.array(each, dtype=np.int64).tobytes() for each in hashes.values()],
        "lines": [lines[stratum] for stratum in hashes],
    }


@dataclass
class Stratum:
    """Hashes of all rows, and the lines of low ones."""

    hashes: list[int] = field(default_factory=list)
    low: list[tuple[int, str]] = field(default_factory=list)


def strata(
    uri: str, seed: int, num_cpus: float, limit: int, limits: Mapping[str, int]
) -> dict[str, Stratum]:
    """The rows of a dataset by stratum; lines where the hash is at most the limit."""
    found: dict[str, Stratum] = defaultdict(Stratum)
    made = tokenise.lines(uri, num_cpus).map_batches(
        hashed, fn_args=(seed, limit, limits), num_cpus=num_cpus, batch_size=BATCH_ROWS
    )
    for block in tokenise.blocks(made):
        columns = block["stratum"], block["hashes"], block["lines"]
        for name, hashes, lines in zip(*columns, strict=True):
            numbers = np.frombuffer(hashes, dtype=np.int64).tolist()
            most = limits.get(str(name), limit)
            low = (number for number in numbers if number <= most)
            found[str(name)].hashes += numbers
            found[str(name)].low += zip(low, map(str, lines), strict=True)
    return found


def thresholds(strata: Mapping[str, list[int]], fraction: float) -> dict[str, tuple[int, int]]:
    """Stratum -> (largest hash kept, number of rows kept): exactly ceil(fraction * rows)."""
    found = {}
    for stratum, hashes in strata.items():
        count = math.ceil(fraction * len(hashes))
        found[stratum] = (int(np.partition(hashes, count - 1)[count - 1]), count)
    return found


def _limit(fraction: float) -> int:
    return min(HASHES, int(HASHES * fraction * SPARE))


def stratified(uri: str, fraction: float, seed: int, num_cpus: float) -> list[str]:
    """The sampled lines of a dataset, by stratum and hash; exact in every stratum."""
    limit = _limit(fraction)
    found = strata(uri, seed, num_cpus, limit, {})
    wanted = thresholds({name: each.hashes for name, each in found.items()}, fraction)
    lacking = {name: largest for name, (largest, _) in wanted.items() if largest > limit}
    if lacking:
        more = strata(uri, seed, num_cpus, -1, lacking)
        found |= {name: more[name] for name in lacking}
    # Rows with equal content have equal hashes: the count cuts them to the exact number.
    return [line for name in sorted(found) for line in _lowest(found[name].low, wanted[name][1])]


def at_random(uris: list[str], fraction: float, seed: int, num_cpus: float) -> list[str]:
    """The sampled lines of all datasets taken as one: small ones get what falls to them."""
    limit = _limit(fraction)
    while True:
        known = [strata(uri, seed, num_cpus, limit, {}) for uri in uris]
        everything = [each for found in known for each in found.values()]
        hashes = {"": [number for each in everything for number in each.hashes]}
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
    options = settings["fraction"], settings["seed"], run.light_cpus
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
