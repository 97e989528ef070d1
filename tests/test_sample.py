"""The stratified sample, on real Ray Data."""

import json
import math
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray

from bar_ray.cluster import session
from bar_ray.data import formats, sample, tokenise
from bar_ray.types import UserError

SIZES = {"": 600, "common": 300, **{f"rare{n}": 3 for n in range(8)}}
HUGE = 2**70  # no 64-bit integer


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in session.RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()


def rows() -> list[dict]:
    found = []
    for source, size in SIZES.items():
        for number in range(size):
            asked = {"role": "user", "content": f"{source} {number} é"}
            named = {"source": source} if source else {}
            found.append({**named, "messages": [asked, {"role": "assistant", "content": "yes"}]})
    return found


def write(path: Path, rows: list) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def asked(lines: list[str]) -> list[str]:
    return [json.loads(line)["messages"][0]["content"] for line in lines]


def test_tasks_begin_at_once_and_are_two_to_a_cpu() -> None:
    """Ray Data alone runs one of them in the first second, and then as many as there are."""

    def slowly(batch: dict) -> dict:
        began = time.monotonic()
        time.sleep(1.5)
        return {"began": [began], "ended": [time.monotonic()]}

    parts = [formats.Part("a.jsonl", n, n + 1) for n in range(8)]
    list(tokenise.blocks(tokenise.of_parts(parts, slowly)))  # workers start
    made = [*tokenise.blocks(tokenise.of_parts(parts, slowly))]
    spans = [
        (float(b["began"][n]), float(b["ended"][n])) for b in made for n in range(len(b["began"]))
    ]
    at_once = [sum(began <= at < ended for began, ended in spans) for at, _ in spans]
    assert len(spans) == 8 and max(at_once) == 4
    first = min(began for began, _ in spans)
    assert sum(began < first + 0.8 for began, _ in spans) == 4


@pytest.mark.parametrize("fraction", [0.01, 0.05, 0.3, 1.0])
def test_the_share_is_exact_in_every_stratum(fraction: float, tmp_path: Path) -> None:
    lines = sample.stratified(write(tmp_path / "a.jsonl", rows()), fraction, 0)
    counts = Counter(json.loads(line).get("source", "") for line in lines)
    assert counts == {name: math.ceil(fraction * size) for name, size in SIZES.items()}
    assert len({*lines}) == len(lines)


def test_layout_changes_nothing(tmp_path: Path) -> None:
    everything = rows()
    one = sample.stratified(write(tmp_path / "a.jsonl", everything), 0.05, 3)
    turned = [dict(reversed(row.items())) for row in reversed(everything)]
    write(tmp_path / "many" / "0.jsonl", turned[:500])
    write(tmp_path / "many" / "1.jsonl", turned[500:])
    assert asked(sample.stratified(str(tmp_path / "many"), 0.05, 3)) == asked(one)
    table = pa.Table.from_pylist([{"source": None, **row} for row in everything])
    pq.write_table(table, tmp_path / "a.parquet")
    assert asked(sample.stratified(str(tmp_path / "a.parquet"), 0.05, 3)) == asked(one)
    assert asked(sample.stratified(str(tmp_path / "a.jsonl"), 0.05, 4)) != asked(one)


def test_a_larger_sample_holds_a_smaller_one(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", rows())
    small, large = (sample.stratified(uri, fraction, 0) for fraction in (0.05, 0.2))
    assert {*small} < {*large}


@pytest.mark.parametrize("fraction", [0.002, 0.05, 1.0])
def test_at_random_takes_from_all_as_one(fraction: float, tmp_path: Path) -> None:
    uris = [write(tmp_path / "a.jsonl", rows()), write(tmp_path / "b.jsonl", rows()[:5])]
    lines = sample.at_random(uris, fraction, 0)
    assert len(lines) == math.ceil(fraction * (sum(SIZES.values()) + 5))
    limit = max(sample.content_hash(line, 0) for line in lines)
    lower = [r for r in rows() if sample.content_hash(json.dumps(r), 0) < limit]
    assert {*asked(lines)} >= {r["messages"][0]["content"] for r in lower}


def test_a_row_that_is_none_is_named(tmp_path: Path) -> None:
    uri = write(tmp_path / "a.jsonl", [*rows(), [1]])
    with pytest.raises(UserError, match=rf"a\.jsonl line {sum(SIZES.values()) + 1}: must be"):
        sample.stratified(uri, 0.05, 0)
    Path(uri).write_text("{not json\n")
    with pytest.raises(UserError, match="line 1: is not valid JSON"):
        sample.stratified(uri, 0.05, 0)


@pytest.mark.parametrize(
    "value", [HUGE, float("nan"), 1e-7, "\u2028", "\ud800", {"b": 1, "a": [None]}]
)
def test_any_content_has_a_hash(value: object) -> None:
    line = json.dumps({"x": value, "messages": []})
    turned = json.dumps({"messages": [], "x": value}, ensure_ascii=False, indent=1)
    assert sample.content_hash(line, 0) == sample.content_hash(turned, 0)
    assert sample.content_hash(line, 0) != sample.content_hash(line, 1)
    assert 0 <= sample.content_hash(line, -1) < sample.HASHES
