"""The "math" reward: math-verify in worker processes, with the deadline kept from outside.

A pathological answer can hang or exhaust whatever parses it. Here that costs one worker, which is
killed and started again, and the verdict says "timeout" or "crash". It works from any thread of any
process: nothing here uses signals. Ground truth: a number or an expression, as text or as a number.
Answers are read from `#### 85`, `\\boxed{85}`, `$85$`, `= 85` or a last plain number; when an
integer is asked for, an expression that merely evaluates to it ("40+45") is wrong.
"""

import atexit
import contextlib
import functools
import json
import os
import queue
import re
import selectors
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bar_ray.types import UserError, Verdict

_WORKER = Path(__file__).with_name("math_worker.py")
_START_S = 120.0
_RENEW_AFTER = 20_000
_PLAIN_INTEGER = re.compile(r"\s*(-?(?:0|[1-9]\d{0,17}))\s*")


class Verifier:
    """One worker process, started when first needed; use it from one thread at a time."""

    def __init__(self, deadline_s: float = 5.0) -> None:
        self.deadline_s = deadline_s
        self._process: subprocess.Popen[bytes] | None = None
        self._served = 0

    def outcome(self, gold: str, completion: str) -> str:
        """The worker's word, "timeout" when it gave none in time, "crash" when it died."""
        if self._served >= _RENEW_AFTER:
            self.stop()
        process = self._process or self._start()
        assert process.stdin is not None
        self._served += 1
        with contextlib.suppress(BrokenPipeError):  # a worker that died meanwhile reads as a crash
            process.stdin.write(json.dumps([gold, completion]).encode() + b"\n")
            process.stdin.flush()
        reply = self._read_line(process, self.deadline_s)
        if reply in ("timeout", "crash"):
            self.stop()
        return reply

    def stop(self) -> None:
        """End the worker; the next request starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
        self._process, self._served = None, 0

    def _start(self) -> subprocess.Popen[bytes]:
        # The worker needs the import path and nothing else: no keys, no tokens.
        path = os.pathsep.join(entry for entry in sys.path if entry)
        self._process = subprocess.Popen(
            [sys.executable, "-P", str(_WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        )
        if self._read_line(self._process, _START_S) != "ready":
            self.stop()
            raise RuntimeError(f"the math-verify worker did not start: {sys.executable} {_WORKER}")
        return self._process

    @staticmethod
    def _read_line(process: subprocess.Popen[bytes], timeout_s: float) -> str:
        assert process.stdout is not None
        deadline, line = time.monotonic() + timeout_s, b""
        with selectors.DefaultSelector() as selector:
            selector.register(process.stdout, selectors.EVENT_READ)
            while not line.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    return "timeout"
                chunk = os.read(process.stdout.fileno(), 4096)
                if not chunk:
                    return "crash"
                line += chunk
        return line.decode().strip()


class VerifierPool:
    """A few verifiers shared by all threads of this process."""

    def __init__(self, num_workers: int, deadline_s: float = 5.0) -> None:
        self.num_workers = num_workers
        self._all = [Verifier(deadline_s) for _ in range(num_workers)]
        self._idle: queue.SimpleQueue[Verifier] = queue.SimpleQueue()
        for verifier in self._all:
            self._idle.put(verifier)
        atexit.register(self.stop)

    def grade_batch(self, items: Sequence[tuple[str, Any]]) -> list[Verdict]:
        """Verdicts in order; each distinct (completion, ground truth) is verified once."""
        pairs = [(completion, _gold_text(truth)) for completion, truth in items]
        distinct = list(dict.fromkeys(pairs))
        with ThreadPoolExecutor(self.num_workers) as threads:
            verdicts = dict(zip(distinct, threads.map(self._grade_pair, distinct), strict=True))
        return [verdicts[pair] for pair in pairs]

    def stop(self) -> None:
        """End all workers."""
        for verifier in self._all:
            verifier.stop()

    def _grade_pair(self, pair: tuple[str, str]) -> Verdict:
        completion, gold = pair
        outcome = _compare_integers(gold, completion)
        if outcome is None:
            verifier = self._idle.get()
            try:
                outcome = verifier.outcome(gold, completion)
            finally:
                self._idle.put(verifier)
        if outcome == "no gold":
            raise UserError(f'ground truth for the reward "math" holds no expression: {gold!r:.80}')
        return Verdict(1.0 if outcome == "right" else 0.0, outcome)


def grade(completion: str, ground_truth: Any) -> Verdict:
    """Verify one completion."""
    return grade_batch([(completion, ground_truth)])[0]


def grade_batch(items: Sequence[tuple[str, Any]]) -> list[Verdict]:
    """Verify many, by the workers that this process shares."""
    return _default_pool().grade_batch(items)


def validate(ground_truth: Any) -> None:
    """UserError when the ground truth is neither a number nor a text."""
    _gold_text(ground_truth)


def _compare_integers(gold: str, completion: str) -> str | None:
    """The verdict without sympy where it is beyond doubt: a bare integer against an integer."""
    wanted = _PLAIN_INTEGER.fullmatch(gold)
    _, mark, tail = completion.rpartition("####")
    given = _PLAIN_INTEGER.fullmatch(tail.strip().partition("\n")[0] if mark else completion)
    if wanted is None or given is None:
        return None
    return "right" if int(wanted[1]) == int(given[1]) else "wrong"


def _gold_text(ground_truth: Any) -> str:
    is_number = isinstance(ground_truth, int | float) and not isinstance(ground_truth, bool)
    text = str(ground_truth).strip() if is_number or isinstance(ground_truth, str) else ""
    if not text:
        raise UserError(
            f'ground truth for the reward "math" is a number or a text, not {ground_truth!r:.80}.'
        )
    return text


@functools.lru_cache(1)
def _default_pool() -> VerifierPool:
    return VerifierPool(max(1, min(4, (os.cpu_count() or 1) // 2)))
