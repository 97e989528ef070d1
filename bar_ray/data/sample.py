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
    options = {"num_cpus": num_cpus, "batch_size": 4096}
    strata: dict[str, list[int]] = defaultdict(list)
    first = tokenise.lines(uri, num_cpus).map_batches(hashed, fn_args=(seed,), **options)
    for batch in tokenise.blocks(first):
        for stratum, value in zip(batch["stratum"], batch["hash"], strict=True):
            strata[stratum].append(int(value))
    limits = thresholds(strata, fraction)
    largest = {stratum: value for stratum, (value, _) in limits.items()}
    by_stratum: dict[str, list[tuple[int, str]]] = defaultdict(list)
    second = tokenise.lines(uri, num_cpus).map_batches(kept, fn_args=(seed, largest), **options)
    for batch in tokenise.blocks(second):
        rows = zip(batch["stratum"], batch["hash"], batch["line"], strict=True)
        for stratum, value, line in rows:
            by_stratum[stratum].append((int(value), str(line)))
    # Rows with equal content have equal hashes: the count cuts them to the exact number.
    return [
        line
        for stratum in sorted(by_stratum)
        for _, line in sorted(by_stratum[stratum])[: limits[stratum][1]]
    ]


def run(step: Any, run: Any) -> None:
    """Data: SFT sources by name; settings: fraction, seed. Output: `<name>.jsonl` and counts."""
    ray.data.DataContext.get_current().execution_options.preserve_order = True
    counts: dict[str, int] = {}
    with run.output(step, counts) as folder:
        for name in step.data:
            uri = run.locate(step, name)
            lines = stratified(
                uri, step.settings["fraction"], step.settings["seed"], run.light_cpus
            )
            Path(folder, f"{name}.jsonl").write_text("".join(line + "\n" for line in lines))
            counts[f"rows:{name}"] = len(lines)
