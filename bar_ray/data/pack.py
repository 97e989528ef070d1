"""Packing documents into rows of fixed length, and token shards that are read memory-mapped.

A row holds whole documents one after another; position ids restart at each, which is how attention
knows not to look across. Text longer than a row is cut into pieces; a conversation longer than a
row is dropped and counted, because its answer may lie in the part cut off.

Shapes: R rows, S tokens per row.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

OPEN_ROWS = 64  # rows kept open for first-fit packing


@dataclass
class PackStats:
    """What went into the rows."""

    rows: int = 0
    docs: int = 0
    tokens: int = 0
    loss_tokens: int = 0
    dropped: int = 0


class Row:
    """A row being filled."""

    def __init__(self, seq_len: int, pad_id: int) -> None:
        self.tokens = np.full(seq_len, pad_id, dtype=np.int32)
        self.loss = np.zeros(seq_len, dtype=np.uint8)
        self.positions = np.zeros(seq_len, dtype=np.int32)
        self.used = 0

    def add(self, ids: list[int], mask: list[int]) -> None:
        start, end = self.used, self.used + len(ids)
        self.tokens[start:end] = ids
        self.loss[start:end] = mask
        self.loss[start] = 0  # nothing before it in its document predicts the first token
        self.positions[start:end] = np.arange(len(ids))
        self.used = end

    def close(self) -> None:
        """Padding is a document of its own without loss."""
        self.positions[self.used :] = np.arange(len(self.positions) - self.used)


def pack(
    docs: Iterable[tuple[list[int], list[int]]],
    seq_len: int,
    pad_id: int,
    split: bool,
    stats: PackStats,
) -> Iterator[Row]:
    """First-fit packing of (token ids, loss mask) in their order; `split` cuts long documents."""
    open_rows: list[Row] = []
    for ids, mask in _pieces(docs, seq_len, split, stats):
        row = next((r for r in open_rows if r.used + len(ids) <= seq_len), None)
        if row is None:
            row = Row(seq_len, pad_id)
            open_rows.append(row)
        row.add(ids, mask)
        if len(open_rows) > OPEN_ROWS or row.used == seq_len:
            fullest = max(open_rows, key=lambda r: r.used)
            open_rows.remove(fullest)
            yield _count(fullest, stats)
    for row in open_rows:
        yield _count(row, stats)


def _pieces(
    docs: Iterable[tuple[list[int], list[int]]], seq_len: int, split: bool, stats: PackStats
) -> Iterator[tuple[list[int], list[int]]]:
    for ids, mask in docs:
        if len(ids) > seq_len and not split:
            stats.dropped += 1
            continue
        stats.docs += 1
        for start in range(0, len(ids), seq_len):
            yield ids[start : start + seq_len], mask[start : start + seq_len]


def _count(row: Row, stats: PackStats) -> Row:
    row.close()
    stats.rows += 1
    stats.tokens += row.used
    stats.loss_tokens += int(row.loss.sum())
    return row


def write_rows(folder: str | Path, rows: Iterable[Row], seq_len: int, stats: PackStats) -> None:
    """Append rows to flat files; memory stays at a few rows."""
    folder = Path(folder)
    names = ("tokens", "loss", "positions")
    handles = {name: open(folder / f"{name}.bin", "wb") for name in names}
    try:
        for row in rows:
            for name in names:
                handles[name].write(getattr(row, name).tobytes())
    finally:
        for handle in handles.values():
            handle.close()
    index = {"seq_len": seq_len, **asdict(stats)}
    (folder / "index.json").write_text(json.dumps(index, indent=1))


class TokenShard:
    """Packed rows on disk, memory-mapped: `tokens`, `loss`, `positions`, each [R, S]."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.index = json.loads((folder / "index.json").read_text())
        shape = (self.index["rows"], self.index["seq_len"])
        self.tokens = np.memmap(folder / "tokens.bin", np.int32, "r", shape=shape)
        self.loss = np.memmap(folder / "loss.bin", np.uint8, "r", shape=shape)
        self.positions = np.memmap(folder / "positions.bin", np.int32, "r", shape=shape)

    def __len__(self) -> int:
        return self.index["rows"]
