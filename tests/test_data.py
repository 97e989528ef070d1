"""Formats, packing, order of samples, the stratified sample."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from bar_ray.data import formats, pack, sample
from bar_ray.data.batches import Batches
from bar_ray.data.mixture import Mixture, steps_of
from bar_ray.data.pack import PackStats, TokenShard
from bar_ray.recipe import Run, Stage
from bar_ray.types import UserError


def write_lines(path: Path, rows: list) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": "x"}, "line 2: `messages` is missing"),
        ("{not json", "line 2: is not valid JSON"),
        ({"messages": [{"content": "x"}]}, "line 2: `messages[0].role` is missing"),
        ([1], "line 2: must be an object"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: object, message: str) -> None:
    good = {"messages": [{"role": "user", "content": "x"}]}
    path = write_lines(tmp_path / "a.jsonl", [good, row])
    with pytest.raises(UserError) as caught:
        list(formats.read_rows(path, "messages"))
    assert message in str(caught.value) and path in str(caught.value)


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    texts = ["next line \x85 and \u2028 and \u2029", "form feed \x0c", "\U0001f600" * 9]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts))
    assert [row["text"] for row in formats.read_rows(str(path), "text")] == texts


@pytest.mark.parametrize("end", ["\n", ""])
def test_parts_hold_every_line_once_wherever_they_are_cut(tmp_path: Path, end: str) -> None:
    lines = [json.dumps({"text": "é" * n}, ensure_ascii=False) for n in (0, 7, 1, 30, 2, 2)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(lines[:3]) + "\n\n" + "\n".join(lines[3:]) + end)
    for size in range(1, 60):
        parts = formats.parts(str(path), part_bytes=size)
        found = [row for part in parts for row in formats.read_part(part)]
        assert [line for _, line in found] == lines
        assert formats.where(str(path), found[3][0]) == f"{path} line 5"


def test_parquet_rows_are_those_of_jsonl(tmp_path: Path) -> None:
    call = {"function": {"name": "f", "arguments": '{"a": 1}'}}
    message = {"role": "assistant", "content": "x", "tool_calls": [call]}
    rows = [{"messages": [message], "tools": [{"name": "f"}], "n": n} for n in range(5)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=2)
    assert list(formats.read_rows(str(tmp_path / "a.parquet"), "messages")) == rows
    groups = pq.ParquetFile(tmp_path / "a.parquet").metadata
    for part_bytes, number in ((1, 3), (2 * groups.row_group(0).total_byte_size, 2), (2**20, 1)):
        parts = formats.parts(str(tmp_path / "a.parquet"), part_bytes=part_bytes)
        found = [json.loads(line)["n"] for part in parts for _, line in formats.read_part(part)]
        assert found == [0, 1, 2, 3, 4] and len(parts) == number
    with pytest.raises(UserError, match=r"a.parquet row 1: `text` is missing"):
        list(formats.read_rows(str(tmp_path / "a.parquet"), "text"))


def test_a_missing_dataset_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset at"):
        formats.files(str(tmp_path / "none.jsonl"))


NAME = {"name": "f"}


def test_arguments_of_different_tools_are_not_merged(tmp_path: Path) -> None:
    calls = [{"city": "Oslo"}, {"a": 1, "b": [2]}]
    rows = [
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"function": {**NAME, "arguments": c}}]}
            ]
        }
        for c in calls
    ]
    read = list(formats.read_rows(write_lines(tmp_path / "a.jsonl", rows), "messages"))
    assert [r["messages"][0]["tool_calls"][0]["function"]["arguments"] for r in read] == calls


def docs(lengths: list[int]) -> list[tuple[list[int], list[int]]]:
    """Documents whose tokens say which document they belong to."""
    return [
        ([number + 1] * n, [0] * (n // 2) + [1] * (n - n // 2)) for number, n in enumerate(lengths)
    ]


def packed(tmp_path: Path, lengths: list[int], seq_len: int, split: bool) -> TokenShard:
    stats = PackStats()
    rows = pack.pack(docs(lengths), seq_len, 0, split, stats)
    pack.write_rows(tmp_path, rows, seq_len, stats)
    return TokenShard(tmp_path)


def test_packing_keeps_every_token_once_and_restarts_positions(tmp_path: Path) -> None:
    lengths = list(np.random.default_rng(0).integers(1, 17, size=300))
    shard = packed(tmp_path, lengths, 16, split=False)
    for number, length in enumerate(lengths, start=1):
        rows, columns = np.nonzero(shard.tokens == number)
        assert len(columns) == length and len(set(rows)) == 1
        assert list(shard.positions[rows, columns]) == list(range(length))
    assert shard.index["docs"] == 300 and shard.index["dropped"] == 0
    assert shard.index["tokens"] == sum(lengths) > 0.9 * shard.tokens.size


def test_the_first_token_of_a_document_and_padding_never_count(tmp_path: Path) -> None:
    shard = packed(tmp_path, [5, 5, 3], 8, split=False)
    assert not shard.loss[shard.positions == 0].any()
    assert not shard.loss[shard.tokens == 0].any()


def test_long_text_is_cut_and_long_conversations_are_dropped(tmp_path: Path) -> None:
    (tmp_path / "cut").mkdir()
    (tmp_path / "drop").mkdir()
    cut = packed(tmp_path / "cut", [20, 4], 8, split=True)
    dropped = packed(tmp_path / "drop", [20, 4], 8, split=False)
    assert cut.index["tokens"] == 24 and cut.index["dropped"] == 0
    assert dropped.index["tokens"] == 4 and dropped.index["dropped"] == 1


def test_mixture_follows_shares_and_covers_each_epoch() -> None:
    mixture = Mixture([50, 1000], [0.25, 0.75], 4000, seed=3)
    assert abs((mixture.source == 0).mean() - 0.25) < 0.002
    rows = mixture.row[mixture.source == 0]
    for epoch in range(len(rows) // 50):
        assert sorted(rows[epoch * 50 : (epoch + 1) * 50]) == list(range(50))
    assert list(rows[:50]) != list(rows[50:100]), "every epoch has its own order"
    tenth = mixture.source[:400]
    assert abs((tenth == 0).mean() - 0.25) < 0.01, "the shares hold in every stretch"


def test_order_depends_on_the_seed_alone() -> None:
    first, again, other = (Mixture([10, 20], [1, 1], 90, seed) for seed in (1, 1, 2))
    assert np.array_equal(first.row, again.row) and np.array_equal(first.source, again.source)
    assert not np.array_equal(first.row, other.row)
    longer = Mixture([10, 20], [1, 1], 300, 1)
    assert np.array_equal(longer.row[:90], first.row), "a longer run starts the same"


def test_steps_come_from_epochs_when_not_given() -> None:
    assert steps_of(7, 2.0, 10, 500) == 7
    assert steps_of(0, 2.0, 10, 500) == 100


@pytest.mark.parametrize("world", [1, 2, 3, 4, 5, 7, 9])
def test_global_batch_does_not_change_with_workers(tmp_path: Path, world: int) -> None:
    packed(tmp_path, [8] * 40, 8, split=False)
    stage = Stage(steps=5, batch_size=8, seq_len=8, run=Run(num_workers=world, micro_batch=3))
    batches = Batches([str(tmp_path)], [1.0], stage, seed=0)
    for step in range(5):
        parts = [batches(step, rank, world) for rank in range(world)]
        micro = [m for p in parts for m in p.micro]
        assert len({len(p.micro) for p in parts}) == 1, "ranks wait for each other at every pass"
        assert all(m.counts or not m.loss_MS.any() for m in micro)
        counted = [tuple(r.tolist()) for m in micro if m.counts for r in m.tokens_MS]
        rows = set(counted)
        assert len(counted) == 8, "no row twice"
        alone = batches(step, 0, 1)
        assert rows == {tuple(r.tolist()) for m in alone.micro for r in m.tokens_MS}
        assert len(rows) == 8
        assert {p.loss_tokens for p in parts} == {alone.loss_tokens}


def test_sample_is_exact_in_every_stratum() -> None:
    rng = np.random.default_rng(0)
    strata = {
        "a": rng.integers(0, 2**60, 1000).tolist(),
        "rare": rng.integers(0, 2**60, 7).tolist(),
    }
    found = sample.thresholds(strata, 0.05)
    assert found["a"][1] == 50 and found["rare"][1] == 1
    assert sum(h <= found["a"][0] for h in strata["a"]) == 50


def test_content_hash_ignores_key_order_and_layout() -> None:
    assert sample.content_hash('{"a":1, "b": 2}', 0) == sample.content_hash('{"b":2,"a":1}', 0)
    assert sample.content_hash('{"a":1}', 0) != sample.content_hash('{"a":1}', 1)


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".jsonl.zst", ".arrow", ".parquet"])
def test_every_kind_of_file_holds_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{"text": f"{n} é", **({"n": n} if n % 2 else {})} for n in range(5)]
    path = tmp_path / f"a{suffix}"
    table = pa.Table.from_pylist(rows, pa.schema({"text": pa.string(), "n": pa.int64()}))
    if suffix == ".parquet":
        pq.write_table(table, path)
    elif suffix == ".arrow":  # as `datasets` saves one
        with pa.ipc.new_stream(path, table.schema) as sink:
            sink.write_table(table, max_chunksize=2)
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
        with pa.output_stream(path, compression="detect") as sink:
            sink.write(content)
    assert list(formats.read_rows(str(tmp_path), "text")) == rows, "nulls of columns are left out"
    place = [place for part in formats.parts(str(path)) for place, _ in formats.read_part(part)][3]
    number = "row 4" if suffix in formats.COLUMNAR else "line 4"
    assert formats.where(str(path), place) == f"{path} {number}"


def test_a_row_of_other_bytes_is_one_fault(tmp_path: Path) -> None:
    good = [f"{n},{n}\n".encode() for n in range(5000)]
    lines = [b"text,n\n", *good[:5], b"caf\xe9,5\n", *good]
    (tmp_path / "a.csv").write_bytes(b"".join(lines))
    [part] = formats.parts(str(tmp_path / "a.csv"))
    read = [line for _, line in formats.read_part(part)]
    assert len(read) == 5006
    assert [n for n, line in enumerate(read) if line.startswith(formats.NO_TEXT)] == [5]


def test_files_below_a_relative_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data" / "more").mkdir(parents=True)
    write_lines(tmp_path / "data" / "more" / "a.jsonl", [{"text": "a"}])
    monkeypatch.chdir(tmp_path)
    for folder in ("data", "data/", "./data"):
        assert len(formats.files(folder, "more/*")) == 1


def test_files_are_chosen_by_a_pattern(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name in ("data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl", "notes.txt"):
        write_lines(tmp_path / name, [{"text": name}])
    chosen = formats.files(str(tmp_path), "data/train-*")
    assert [Path(file).name for file in chosen] == ["train-0.jsonl", "train-1.jsonl"]
    assert len(formats.files(f"{tmp_path}/")) == 3
    with pytest.raises(
        UserError, match=r"matches data/dev\*; there are data/test-0.jsonl, data/tr"
    ):
        formats.files(str(tmp_path), "data/dev*")


NAMED = {
    "a.json": '\ufeff [{"text": "one é", "n": null},\n {"text": "two"}]',
    "lines.json": '\ufeff{"text": "one é", "n": null}\n{"text": "two"}\n',
    "a.csv": '\ufefftext,n\r\none é,\r\n"two, ""2""\nlines",2\r\n',
    "a.tsv": 'text\tn\none é\t\n\n"two, ""2""\nlines"\t2\n',
}


@pytest.mark.parametrize("name", NAMED)
def test_files_that_are_taken_when_named(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.write_text(NAMED[name], newline="")
    rows = [{"text": "one é", "n": None}, {"text": "two"}]
    if formats.ends_with(name, ".csv", ".tsv"):
        rows = [{"text": "one é", "n": ""}, {"text": 'two, "2"\nlines', "n": "2"}]
    assert list(formats.read_rows(str(path), "text")) == rows
    places = [place for part in formats.parts(str(path)) for place, _ in formats.read_part(part)]
    kind = "line" if name == "lines.json" else "row"
    assert [formats.where(str(path), place) for place in places] == [
        f"{path} {kind} {number}" for number in (1, 2)
    ]
    with pytest.raises(UserError, match=r"no dataset at .*by their names, or by `files`"):
        formats.files(str(tmp_path))
    write_lines(tmp_path / "b.jsonl", [{"text": "more"}])
    assert formats.files(str(tmp_path), f"none*, {name}") == [str(path)]
    assert len(formats.files(str(tmp_path), f"b*, *{path.suffix}")) == 2
    (tmp_path / f"b{path.suffix}").write_text("of another kind")
    assert len(formats.files(str(tmp_path), f"b*, {name}")) == 2, "each by its own pattern"


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.json", b'[{"text": "one"}, {"text": ', "is not valid JSON: Expecting value"),
        ("a.json", b'[{"text": "one"}, "two"]', 'row 2: must be an object with text, not "two"'),
        ("a.csv", b"text,n\none,1\ntwo\n", "row 2: has 1 fields, and the first row names 2"),
        ("a.csv", b"text,n\none,1\ntwo \xff,2\n", "row 2: is not UTF-8 text: it has a byte 0xff"),
        ("a.csv", b'n,text\n1,"one\n2,two\n', "cannot be read: line 3: unexpected end of data"),
        ("a.csv", b"text,n,text\none,1,two\n", "a column is named twice, of text, n, text"),
    ],
)
def test_faults_of_files_that_are_named(
    tmp_path: Path, name: str, content: bytes, told: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}:? {told}"):
        list(formats.read_rows(str(tmp_path / name), "text"))


def test_a_cut_file_is_named(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["x" * 500] * 50}), tmp_path / "a.parquet")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:-30])
    with pytest.raises(UserError, match=r"cannot read .*a.parquet"):
        list(formats.read_rows(str(tmp_path), "text"))
