"""The `sample` verb: an exact stratified sample of every SFT source with Ray Data.

A row's place in the order is the hash of its content, so the sample does not depend on file layout,
row order or parallelism, and a larger fraction contains a smaller one. Two passes: the first reads
hashes only and finds each stratum's threshold, the second keeps the rows under it. No shuffle.
A stratum is a dataset of the recipe, and within it a value of the rows' `source` column.
"""

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ray

from bar_ray.data import tokenise


def content_hash(line: str, seed: int) -> int:
    """62 bits of the sha256 of a row's canonical JSON: the same for the same content."""
    canonical = json.dumps(json.loads(line), sort_keys=True, ensure_ascii=False)
    digest = hashlib.sha256(f"{seed}:{canonical}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


@tokenise.or_mistake
def hashed(batch: dict[str, Any], seed: int) -> dict[str, Any]:
    """Lines -> the stratum and content hash of each."""
    rows = tokenise.parse(batch, "messages")
    hashes = np.array([content_hash(line, seed) for line in batch["line"]], dtype=np.int64)
    return {"stratum": [str(row.get("source", "")) for row in rows], "hash": hashes}


@tokenise.or_mistake
def kept(batch: dict[str, Any], seed: int, limits: dict[str, int]) -> dict[str, Any]:
    """The lines whose hash is at most their stratum's limit."""
    found = hashed(batch, seed)
    places = [i for i, s in enumerate(found["stratum"]) if found["hash"][i] <= limits[s]]
    columns = {**found, "line": batch["line"]}
    return {name: np.array([values[i] for i in places]) for name, values in columns.items()}


def thresholds(strata: dict[str, list[int]], fraction: float) -> dict[str, tuple[int, int]]:
    """Stratum -> (largest hash kept, number of rows kept): exactly ceil(fraction * rows)."""
    found = {}
    for stratum, hashes in strata.items():
        count = math.ceil(fraction * len(hashes))
        found[stratum] = (int(np.partition(hashes, count - 1)[count - 1]), count)
    return found


def stratified(uri: str, fraction: float, seed: int, num_cpus: float) -> list[str]:
    """The sampled lines of a dataset, by stratum and hash; exact in every stratum."""
    strata: dict[str, list[int]] = defaultdict(list)
    for stratum, value in row_hashes(uri, seed, num_cpus):
        strata[stratum].append(value)
    limits = thresholds(strata, fraction)
    largest = {stratum: value for stratum, (value, _) in limits.items()}
    found = rows_below(uri, largest, seed, num_cpus)
    # Rows with equal content have equal hashes: the count cuts them to the exact number.
    return [
        line
        for stratum in sorted(found)
        for _, line in sorted(found[stratum])[: limits[stratum][1]]
    ]


def at_random(uris: list[str], fraction: float, seed: int, num_cpus: float) -> list[str]:
    """The sampled lines of all datasets taken as one: small ones get what falls to them."""
    known = [list(row_hashes(uri, seed, num_cpus)) for uri in uris]
    everything = {"": [value for rows in known for _, value in rows]}
    limit, count = thresholds(everything, fraction)[""]
    found = []
    for uri, rows in zip(uris, known, strict=True):
        largest = dict.fromkeys({stratum for stratum, _ in rows}, limit)
        found += [row for s in rows_below(uri, largest, seed, num_cpus).values() for row in s]
    return [line for _, line in sorted(found)[:count]]


def row_hashes(uri: str, seed: int, num_cpus: float) -> Iterator[tuple[str, int]]:
    """Stratum and content hash of every row of a dataset."""
    read = tokenise.lines(uri, num_cpus)
    hashed_rows = read.map_batches(hashed, fn_args=(seed,), num_cpus=num_cpus, batch_size=4096)
    for batch in tokenise.blocks(hashed_rows):
        for stratum, value in zip(batch["stratum"], batch["hash"], strict=True):
            yield str(stratum), int(value)


def rows_below(
    uri: str, largest: dict[str, int], seed: int, num_cpus: float
) -> dict[str, list[tuple[int, str]]]:
    """By stratum, hash and line of the rows whose hash is at most the stratum's limit."""
    found: dict[str, list[tuple[int, str]]] = defaultdict(list)
    options = {"num_cpus": num_cpus, "batch_size": 4096}
    few = tokenise.lines(uri, num_cpus).map_batches(kept, fn_args=(seed, largest), **options)
    for batch in tokenise.blocks(few):
        rows = zip(batch["stratum"], batch["hash"], batch["line"], strict=True)
        for stratum, value, line in rows:
            found[str(stratum)].append((int(value), str(line)))
    return found


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
