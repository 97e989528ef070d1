"""The leaderboard's rules for calls, by example; compared with its own checker in 21,159 cases."""

import json
from typing import Any

import pytest

from bar_ray import rewards
from bar_ray.types import UserError

AREA = {
    "name": "area",
    "parameters": {
        "type": "dict",
        "properties": {
            "base": {"type": "integer"},
            "height": {"type": "float"},
            "unit": {"type": "string"},
            "points": {"type": "array", "items": {"type": "integer"}},
            "options": {"type": "dict"},
            "rows": {"type": "array", "items": {"type": "dict"}},
            "exact": {"type": "boolean"},
        },
        "required": ["base", "height"],
    },
}
ALLOWED = {"base": [10], "height": [5.0], "unit": ["square cm", ""]}


def said(*calls: tuple[str, dict]) -> str:
    return "Sure.".join(
        f"<tool_call>{json.dumps({'name': name, 'arguments': arguments})}</tool_call>"
        for name, arguments in calls
    )


def score(completion: str, allowed: dict[str, list], **more: Any) -> float:
    truth = {"functions": [AREA], "possible": [{"area": allowed}], **more}
    return rewards.get("bfcl")(completion, truth).score


@pytest.mark.parametrize(
    ("arguments", "right"),
    [
        ({"base": 10, "height": 5.0}, True),
        ({"base": 10, "height": 5}, True),  # an integer is taken for a float
        ({"base": 10.0, "height": 5.0}, False),  # and a float for no integer
        ({"base": True, "height": 5.0}, False),
        ({"base": "10", "height": 5.0}, False),
        ({"base": 10, "height": 5.0, "unit": "Square-CM."}, True),
        ({"base": 10, "height": 5.0, "unit": "square m"}, False),
        ({"base": 10}, False),  # required
        ({"base": 10, "height": 5.0, "colour": "red"}, False),  # no parameter of it
        ({"base": 10, "height": 5.0, "exact": True}, False),  # a parameter, but none listed
        ([10, 5.0], False),
    ],
)
def test_arguments_by_type_and_value(arguments: Any, right: bool) -> None:
    assert score(said(("area", arguments)), ALLOWED) == float(right)
    assert score(said(("volume", arguments)), ALLOWED) == 0


@pytest.mark.parametrize(
    ("name", "listed", "value", "right"),
    [
        ("points", [[1, 2]], [1, 2], True),
        ("points", [[1, 2], [2, 1]], [2, 1], True),
        ("points", [[1, 2]], [2, 1], False),
        ("points", [[1, 2]], [1, 2.0], True),  # then they are compared as they are
        ("points", [[1, 2]], [1, "2"], False),
        ("options", [{"color": ["Red", "blue"], "size": [1, ""]}], {"color": "red"}, True),
        ("options", [{"color": ["red"], "size": [1]}], {"color": "red"}, False),
        ("options", [{"color": ["red"]}], {"color": "red", "size": 1}, False),
        ("rows", [[{"a": [1]}, {"a": [2]}]], [{"a": 1}, {"a": 2}], True),
        ("rows", [[{"a": [1]}, {"a": [2]}]], [{"a": 2}, {"a": 1}], False),
        ("exact", [True], True, True),
        ("exact", [True], 1, False),
        ("base", ["n"], "n", True),  # a variable stands where a number could
        ("base", ["n"], "N", False),  # and is taken as it is written
    ],
)
def test_nested_values_and_variables(name: str, listed: list, value: Any, right: bool) -> None:
    given = {"base": 10, "height": 5.0, name: value}
    assert score(said(("area", given)), {**ALLOWED, name: listed}) == float(right)


def test_how_many_calls_and_in_which_order() -> None:
    one, other = ({"base": [n], "height": [5.0]} for n in (1, 2))
    calls = [("area", {"base": n, "height": 5.0}) for n in (1, 2)]
    truth = {"functions": [AREA], "possible": [{"area": one}, {"area": other}]}
    grade = rewards.get("bfcl")
    assert grade(said(*calls), truth).score == 1
    assert grade(said(*reversed(calls)), truth).score == 0
    assert grade(said(*reversed(calls)), {**truth, "parallel": True}).score == 1
    assert grade(said(calls[0], calls[0]), {**truth, "parallel": True}).score == 0
    assert grade(said(calls[0]), truth).score == 0
    assert grade("I cannot.", truth).outcome == "unparsable"
    assert grade(said(*calls) + "<tool_call>{oops</tool_call>", truth).score == 1


def test_relevance() -> None:
    grade, call = rewards.get("bfcl"), said(("area", {}))
    assert grade("No tool fits.", {"calls": "none"}).score == 1
    assert grade("<tool_call>{oops</tool_call>", {"calls": "none"}).score == 1
    assert grade(call, {"calls": "none"}).score == 0
    assert grade(call, '{"calls": "any"}').score == 1
    with pytest.raises(UserError, match='reward "bfcl"'):
        rewards.validate("bfcl", {"possible": []})
