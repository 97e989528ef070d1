"""Rows of published benchmarks made prompts of ours, for tests that run programs.

Named by `convert` in `suites.yaml`. HumanEval+ and MBPP+ (Liu et al. 2023, EvalPlus): tests run
in a sandbox beside the program's, without numpy, of which they use one comparison.
"""

import ast
import json
import re
from collections.abc import Mapping
from typing import Any

ASK = "Write a Python program. Answer with the whole program in one fenced block.\n\n"
NUMPY = """
import sys, types

def _flat(value):
    if isinstance(value, (list, tuple, set)):
        return [item for each in value for item in _flat(each)]
    return [value]

def _close(out, expected, rtol=1e-05, atol=1e-08):
    out, expected = _flat(out), _flat(expected)
    near = lambda a, b: a == b or abs(a - b) <= atol + rtol * abs(b)
    return len(out) == len(expected) and all(map(near, out, expected))

def _assert_close(out, expected, rtol=1e-07, atol=0):
    assert _close(out, expected, rtol, atol)

numpy = types.ModuleType("numpy")
numpy.ndarray, numpy.float32, numpy.float64 = type("ndarray", (), {}), float, float
numpy.allclose, numpy.testing = _close, types.SimpleNamespace(assert_allclose=_assert_close)
sys.modules["numpy"] = numpy
"""


def humaneval(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of openai/openai_humaneval or evalplus/humanevalplus: a function to complete."""
    asked = f"Complete this function.\n\n```python\n{row['prompt'].rstrip()}\n```"
    truth = {"entry_point": row["entry_point"], "test": NUMPY + row["test"]}
    return _prompt(row, asked, truth)


def mbpp(row: Mapping[str, Any]) -> dict[str, Any]:
    """Of evalplus/mbppplus: a task and the first of its tests, as published prompts show it."""
    tests = row["test_list"]
    tests = ast.literal_eval(tests) if isinstance(tests, str) else list(tests)
    entry_point = _called(row["test"], tests)
    asked = f"{row['prompt'].strip()}\nIt must pass this test:\n\n```python\n{tests[0]}\n```"
    given = f"{{'__name__': 'tests', {entry_point!r}: candidate}}"
    check = f"TESTS = {row['test']!r}\ndef check(candidate):\n    exec(TESTS, {given})\n"
    return _prompt(row, asked, {"entry_point": entry_point, "test": NUMPY + check})


def _called(test: str, tests: list[str]) -> str:
    """The function that the tests call."""
    found = re.search(r"(\w+)\(\*inp\)", test) or re.search(r"(?:set\()?(\w+)\(", tests[0][6:])
    if found is None:
        raise ValueError("no test calls a function")
    return found[1]


def _prompt(row: Mapping[str, Any], asked: str, truth: dict[str, Any]) -> dict[str, Any]:
    return {
        **{"id": str(row["task_id"]), "verifier": "code", "ground_truth": json.dumps(truth)},
        "messages": [{"role": "user", "content": ASK + asked}],
    }
