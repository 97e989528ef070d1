"""Which rows repeat a test prompt: runs of words that are the same.

A test prompt counts as copied by a row when more than a share of its words lie in runs of `ngram`
words that the row has too (Tulu 3, section 3.2: 8 words, half of them). A prompt shorter than a run
is copied by a row that has a turn of exactly its words.
"""

import functools
import re
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication by it loses nothing


@functools.lru_cache(maxsize=1 << 20)
def _word(word: str) -> int:
    """64 bits, the same in every process (FNV-1a)."""
    value = 0xCBF29CE484222325
    for byte in word.encode():
        value = (value ^ byte) * 0x100000001B3 & 0xFFFFFFFFFFFFFFFF
    return value


def words(text: str) -> np.ndarray:
    """A hash per word, whatever its case and the punctuation around it. [words]"""
    found = re.findall(r"\w+", text.lower())
    return np.fromiter(map(_word, found), np.uint64, len(found))


def runs(hashes: np.ndarray, length: int) -> np.ndarray:
    """A hash per run of `length` words. [words - length + 1]"""
    if len(hashes) < length:
        return np.empty(0, np.uint64)
    powers = np.array([pow(int(FACTOR), n + 1, 2**64) for n in range(length)], np.uint64)
    return (sliding_window_view(hashes, length) * powers).sum(axis=1, dtype=np.uint64)


def turns(row: dict[str, Any]) -> Iterator[str]:
    """The texts of a row: its `text`, or the content of every message."""
    if "text" in row:
        yield row["text"]
    for message in row.get("messages", ()):
        if content := message.get("content"):
            yield content


class TestPrompts:
    """The runs of words of all test prompts."""

    __test__ = False  # pytest takes the name for a test's

    def __init__(self, prompts: Iterable[tuple[str, str]], ngram: int, overlap: float) -> None:
        """`prompts` are (category, text)."""
        self.ngram, self.overlap = ngram, overlap
        self.categories: list[str] = []
        lengths: list[int] = []
        self.short: dict[int, int] = {}  # the one run of a prompt shorter than a run -> its prompt
        hashes: list[np.ndarray] = []
        owners: list[np.ndarray] = []
        for category, text in prompts:
            own, number = words(text), len(self.categories)
            self.categories.append(category)
            lengths.append(len(own))
            if 0 < len(own) < ngram:
                self.short.setdefault(int(runs(own, len(own))[0]), number)
            hashes.append(runs(own, ngram))
            owners.append(np.full(len(hashes[-1]), number, np.int64))
        self.lengths = np.array(lengths, np.int64)
        every = np.concatenate([np.empty(0, np.uint64), *hashes])
        order = np.argsort(every, kind="stable")
        self.hashes = every[order]  # [runs of all prompts], sorted
        places = [np.arange(len(each)) for each in hashes]
        self.owners = np.concatenate([np.empty(0, np.int64), *owners])[order]
        self.places = np.concatenate([np.empty(0, np.int64), *places])[order]

    def copied(self, row: dict[str, Any]) -> str:
        """The category of a test prompt that the row copies; empty when it copies none."""
        each = [found for text in turns(row) if len(found := words(text))]
        for own in each:
            number = self.short.get(int(runs(own, len(own))[0]), -1)
            if number >= 0 and self.lengths[number] == len(own):
                return self.categories[number]
        own_runs = [runs(own, self.ngram) for own in each]
        return self._long(np.unique(np.concatenate([np.empty(0, np.uint64), *own_runs])))

    def _long(self, own: np.ndarray) -> str:
        first = np.searchsorted(self.hashes, own, "left")
        last = np.searchsorted(self.hashes, own, "right")
        hit = np.flatnonzero(last > first)
        found = np.concatenate([np.arange(0), *(np.arange(first[i], last[i]) for i in hit)])
        counts = np.bincount(self.owners[found], minlength=len(self.lengths))
        # What many prompts have in common is too little of each.
        for number in np.flatnonzero(counts * self.ngram > self.overlap * self.lengths):
            covered = np.zeros(self.lengths[number], bool)
            for start in self.places[found[self.owners[found] == number]]:
                covered[start : start + self.ngram] = True
            if covered.mean() > self.overlap:
                return self.categories[number]
        return ""
