"""The "code" reward: a Python function that must return what is expected on every input.

Ground truth: `{"entry_point": "f", "inputs": [[args], ...], "expected": [value, ...]}`. Only inputs
enter the sandbox. Or `{"entry_point": "f", "test": "def check(candidate): ..."}` as HumanEval has
it: the tests run in a sandbox of their own, where the program cannot see them.

Full score or none: a share of passed tests rewards programs that hard-code the easy ones, so
"partly" is counted and scores 0. Give hidden tests other inputs than the prompt shows, or
hard-coded answers pass.
"""

import functools
import hashlib
import json
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bar_ray.rewards.compare import decode, same
from bar_ray.rewards.sandbox import Run, Sandbox
from bar_ray.types import UserError, Verdict

_REL_TOL, _ABS_TOL = 1e-6, 1e-9
_FENCE = re.compile(r"```[^\n`]*\n(.*?)(?:```|\Z)", re.DOTALL)
_MAX_REMEMBERED = 20_000

# Verdicts by content, since the samples of a group often repeat a program. Timeouts and crashes
# are left out: they may have been the machine's fault.
_remembered: OrderedDict[str, Verdict] = OrderedDict()
_remembering = threading.Lock()


def grade(completion: str, ground_truth: Any) -> Verdict:
    """Run the program of one completion."""
    return grade_batch([(completion, ground_truth)])[0]


def grade_batch(items: Sequence[tuple[str, Any]], sandbox: Sandbox | None = None) -> list[Verdict]:
    """Run all programs, `sandbox.num_slots` at a time, each distinct (program, tests) once."""
    sandbox = sandbox or _default_sandbox()
    tests = [_read_tests(ground_truth) for _, ground_truth in items]
    programs = [
        extract_program(completion, test["entry_point"])
        for (completion, _), test in zip(items, tests, strict=True)
    ]
    keys = [_key(program, test) for program, test in zip(programs, tests, strict=True)]
    with _remembering:
        verdicts = {key: _remembered[key] for key in keys if key in _remembered}
    new = {k: (p, t) for k, p, t in zip(keys, programs, tests, strict=True) if k not in verdicts}

    def run(work: tuple[str, dict[str, Any]]) -> Verdict:
        program, test = work
        if "test" in test:
            return judge_check(*sandbox.check(program, test["entry_point"], test["test"]))
        return judge(sandbox.run(program, test["entry_point"], test["inputs"]), test["expected"])

    if new:
        with ThreadPoolExecutor(min(sandbox.num_slots, len(new))) as pool:
            verdicts.update(zip(new, pool.map(run, new.values()), strict=True))
        _remember({key: verdicts[key] for key in new})
    return [verdicts[key] for key in keys]


def judge(run: Run, expected: list[Any]) -> Verdict:
    """Compare what a run returned with what it should have."""
    if run.status != "done":
        return Verdict(0.0, run.status)
    passed = sum(
        call.ok and same(value, call.value, _REL_TOL, _ABS_TOL)
        for call, value in zip(run.calls, expected, strict=True)
    )
    if passed == len(expected):
        return Verdict(1.0, "right")
    if passed:
        return Verdict(0.0, "partly")
    return Verdict(0.0, "wrong" if any(call.ok for call in run.calls) else "crash")


def judge_check(served: Run, tested: Run) -> Verdict:
    """What became of a program and of the tests that called it."""
    if served.status != "done":
        return Verdict(0.0, served.status)
    if tested.status != "done":
        return Verdict(0.0, "wrong" if tested.status == "unparsable" else tested.status)
    [call] = tested.calls
    if call.ok:
        return Verdict(1.0, "right")
    return Verdict(0.0, "wrong" if call.value == "AssertionError" else "crash")


def extract_program(completion: str, entry_point: str) -> str:
    """The last fenced block that defines the function, or names it, or is there; or all of it.

    A usage example behind the program names the function too, but does not define it.
    """
    blocks, name = _FENCE.findall(completion), re.escape(entry_point)
    defining = [b for b in blocks if re.search(rf"\b(def|class)\s+{name}\b|\b{name}\s*=", b)]
    naming = [b for b in blocks if re.search(rf"\b{name}\b", b)]
    return (defining or naming or blocks or [completion])[-1].strip()


def validate(ground_truth: Any) -> None:
    """UserError when the ground truth is not a set of tests."""
    _read_tests(ground_truth)


def _read_tests(ground_truth: Any) -> dict[str, Any]:
    tests = decode(ground_truth, "code")
    if isinstance(tests, dict) and {"entry_point", "test"} <= tests.keys():
        if not re.search(r"\bdef check\(", str(tests["test"])):
            raise UserError('the `test` of the reward "code" must define check(candidate).')
        return tests
    keys = ("entry_point", "inputs", "expected")
    if not isinstance(tests, dict) or any(key not in tests for key in keys):
        raise UserError(
            f'ground truth for the reward "code" needs {", ".join(keys)}: {tests!r:.80}'
        )
    inputs, expected = tests["inputs"], tests["expected"]
    if not inputs or len(inputs) != len(expected):
        raise UserError(
            'ground truth for the reward "code" needs as many expected values as inputs, at least '
            f"one; it has {len(inputs)} inputs and {len(expected)} expected values."
        )
    if not all(isinstance(arguments, list | tuple) for arguments in inputs):
        raise UserError(
            'each input of the reward "code" is a list of arguments, as in [[1, 2], [3, 4]].'
        )
    return tests


def _key(program: str, tests: dict[str, Any]) -> str:
    try:
        content = json.dumps([program, tests], sort_keys=True)
    except TypeError as error:
        raise UserError(
            f'tests of the reward "code" must be plain JSON values: {error}.'
        ) from error
    return hashlib.sha256(content.encode()).hexdigest()


def _remember(verdicts: dict[str, Verdict]) -> None:
    with _remembering:
        _remembered.update(
            (k, v) for k, v in verdicts.items() if v.outcome not in ("timeout", "crash")
        )
        while len(_remembered) > _MAX_REMEMBERED:
            _remembered.popitem(last=False)


@functools.lru_cache(1)
def _default_sandbox() -> Sandbox:
    return Sandbox(num_slots=os.cpu_count() or 1)
