"""The "bfcl" reward: calls judged by the rules of the Berkeley Function-Calling Leaderboard (AST).

Calls are written `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`; what is between such
marks and no JSON counts as no call. Ground truth: `{"functions": [...], "possible": [...]}` as the
leaderboard has them, with `"parallel": true` where calls may come in any order; `{"calls": "none"}`
or `{"calls": "any"}` for (ir)relevance.

A value is right when it has the type that the function says and is among those listed, texts
without their case and ` ,./-_*^`; an argument may be left out where an empty text is listed. A
listed value of another type than the function says stands for a variable: it is compared as it is.
Python's types only; Java and JavaScript are left out.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from bar_ray.rewards.compare import decode
from bar_ray.types import UserError, Verdict

BLOCK = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
TYPES: dict[str, type] = {
    **{"string": str, "integer": int, "float": float, "boolean": bool, "any": str},
    **{"array": list, "tuple": list, "dict": dict},
}
IGNORED = re.compile(r"[ ,./\-_*^]")
OMITTED = ""  # among the listed values: the argument may be left out

Call = Mapping[str, Any]


def grade(completion: str, ground_truth: Any) -> Verdict:
    """Full score or none."""
    truth = _read(ground_truth)
    calls = parse(completion)
    if "calls" in truth:
        right = bool(calls) == (truth["calls"] == "any")
        return Verdict(1.0, "right") if right else Verdict(0.0, "wrong")
    if matches(calls, truth):
        return Verdict(1.0, "right")
    return Verdict(0.0, "wrong" if calls else "unparsable")


def parse(completion: str) -> list[Call]:
    """The calls of a text that can be read."""
    found = []
    for text in BLOCK.findall(completion):
        try:
            call = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            arguments = call.get("arguments", {})
            found.append({"name": call["name"], "arguments": arguments})
    return found


def matches(calls: Sequence[Call], truth: Mapping[str, Any]) -> bool:
    """Every possible answer by a call of its own, taken in the order of the answers."""
    possible, functions = truth["possible"], truth["functions"]
    if len(calls) != len(possible):
        return False
    left = list(calls)
    for answer in possible:
        [(name, allowed)] = answer.items()
        function = next((f for f in functions if f["name"] == name), functions[0])
        candidates = left if truth.get("parallel") else left[:1]
        found = next((call for call in candidates if allows(function, allowed, call)), None)
        if found is None:
            return False
        left = [call for call in left if call is not found]
    return True


def allows(function: Mapping[str, Any], allowed: Mapping[str, list], call: Call) -> bool:
    """Whether a call is one of the possible ones of a function."""
    given, parameters = call["arguments"], function["parameters"]
    known = parameters["properties"]
    if call["name"] != function["name"] or not isinstance(given, dict):
        return False
    if not {*parameters.get("required", ())} <= given.keys():
        return False
    if any(name not in known or name not in allowed for name in given):
        return False
    if not all(_right(known[name], allowed[name], value) for name, value in given.items()):
        return False
    return all(name in given or OMITTED in values for name, values in allowed.items())


def _right(spec: Mapping[str, Any], listed: list, value: Any) -> bool:
    """Whether an argument has the type of its parameter and one of the listed values."""
    wanted = TYPES[spec["type"]]
    inner = TYPES[spec["items"]["type"]] if spec["type"] in ("array", "tuple") else None
    if wanted is float and type(value) is int:
        value = float(value)
    kind = next((type(each) for each in listed if each != OMITTED), wanted)
    if type(value) is not wanted:  # a variable stands where a value could
        return type(value) is kind and value in listed
    if inner is not None and not any(_items_fit(inner, each, value) for each in listed):
        return type(value) is kind and value in listed
    if kind is not wanted:
        return value in listed
    if wanted is dict:
        return any(_same_dict(each, value) for each in listed if each != OMITTED)
    if inner is dict:
        return any(_same_dicts(each, value) for each in listed)
    if wanted is str:
        return _plain(value) in [_plain(each) for each in listed if type(each) is str]
    if wanted is list:
        items = [_plain(each) for each in value]
        return items in [[_plain(item) for item in each] for each in listed]
    return value in listed


def _items_fit(inner: type, listed: Any, values: list) -> bool:
    """Whether items have the type of the parameter's, or of those that are listed."""
    if type(listed) is not list:
        return True
    kind = next((type(each) for each in listed if each != OMITTED), None)
    return all(type(value) is inner or type(value) is kind for value in values)


def _plain(value: Any) -> Any:
    """A text without case, quotes of one kind, spaces and some punctuation; others as they are."""
    return IGNORED.sub("", value).lower().replace("'", '"') if type(value) is str else value


def _same_dict(listed: Mapping[str, list], value: Any) -> bool:
    """Every key among those listed with one of its values, and none missing that may not be."""
    if not isinstance(value, dict) or not isinstance(listed, dict):
        return False
    for key, each in value.items():
        if key not in listed or _plain(each) not in [_plain(one) for one in listed[key]]:
            return False
    return all(key in value or OMITTED in values for key, values in listed.items())


def _same_dicts(listed: Any, values: list) -> bool:
    """Objects one by one, in order."""
    if len(listed) != len(values):
        return False
    return all(_same_dict(each, value) for each, value in zip(listed, values, strict=True))


def validate(ground_truth: Any) -> None:
    """UserError when this is no ground truth of the leaderboard."""
    _read(ground_truth)


def _read(ground_truth: Any) -> dict[str, Any]:
    truth = decode(ground_truth, "bfcl")
    if isinstance(truth, dict) and truth.get("calls") in ("none", "any"):
        return truth
    possible = truth.get("possible") if isinstance(truth, dict) else None
    single = possible and all(isinstance(each, dict) and len(each) == 1 for each in possible)
    if not single or not truth.get("functions"):
        raise UserError(
            'ground truth for the reward "bfcl" is {"functions": [...], "possible": [{NAME: '
            '{ARGUMENT: [VALUE, ...]}}]} or {"calls": "none" or "any"}, not '
            f"{truth!r:.80}."
        )
    return truth
