"""The "tool_call" reward: the completion makes exactly the expected calls.

Calls are written `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Ground truth: a list
of such calls in any order, `{"calls": [...], "ordered": true}` when the order matters, `[]` when no
call may be made. OpenAI's form (`{"function": {...}}`, arguments as JSON text) is accepted there.
Where several arguments would do, `{"name": ..., "schema": {...}}` gives a JSON Schema (2020-12) of
them instead: `enum` lists what is allowed, what is not `required` may be left out. Full score or
none; text around the calls is ignored.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from networkx import Graph
from networkx.algorithms.bipartite import hopcroft_karp_matching
from referencing import Registry
from referencing.exceptions import Unresolvable

from bar_ray.rewards.compare import decode, same
from bar_ray.types import UserError, Verdict

_MARKER = re.compile(r"</?tool_call>")
_BLOCK = re.compile(r"<tool_call>((?:(?!</?tool_call>).)*)</tool_call>", re.DOTALL)

ToolCall = dict[str, Any]


@dataclass(frozen=True)
class Expected:
    """A call that must be made: with these arguments, or any that the schema allows."""

    name: str
    arguments: dict[str, Any]
    schema: Draft202012Validator | None

    def allows(self, call: ToolCall) -> bool:
        if call["name"] != self.name:
            return False
        if self.schema is None:
            return same(self.arguments, call["arguments"])
        return self.schema.is_valid(call["arguments"])


def grade(completion: str, ground_truth: Any) -> Verdict:
    """Match the calls of a completion structurally: same functions, same arguments by value."""
    expected, ordered = _read_calls(ground_truth)
    calls = parse_calls(completion)
    if calls is None:
        return Verdict(0.0, "unparsable")
    matched = _count_in_place(expected, calls) if ordered else _count_anywhere(expected, calls)
    if matched == len(expected) == len(calls):
        return Verdict(1.0, "right")
    if not calls:
        return Verdict(0.0, "unparsable")
    return Verdict(0.0, "partly" if matched else "wrong")


def parse_calls(completion: str) -> list[ToolCall] | None:
    """All calls of a text, or None when one of them is malformed or unfinished."""
    if _MARKER.search(_BLOCK.sub("", completion)):
        return None
    calls = []
    for text in _BLOCK.findall(completion):
        try:
            call = json.loads(text, object_pairs_hook=_distinct, parse_constant=_refuse)
        except (ValueError, RecursionError):
            return None
        if not isinstance(call, dict) or call.keys() != {"name", "arguments"}:
            return None
        if not isinstance(call["name"], str) or not isinstance(call["arguments"], dict):
            return None
        calls.append(call)
    return calls


def validate(ground_truth: Any) -> None:
    """UserError when the ground truth is not a list of calls."""
    _read_calls(ground_truth)


def _count_in_place(expected: list[Expected], calls: list[ToolCall]) -> int:
    return sum(e.allows(c) for e, c in zip(expected, calls, strict=False))


def _count_anywhere(expected: list[Expected], calls: list[ToolCall]) -> int:
    """The most pairs: a call that two schemas allow goes where the other has no choice."""
    graph, wanted = Graph(), [("expected", i) for i in range(len(expected))]
    graph.add_nodes_from([*wanted, *range(len(calls))])
    for node, one in zip(wanted, expected, strict=True):
        graph.add_edges_from((node, i) for i, call in enumerate(calls) if one.allows(call))
    return len(hopcroft_karp_matching(graph, wanted)) // 2


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read_calls(ground_truth: Any) -> tuple[list[Expected], bool]:
    truth = decode(ground_truth, "tool_call")
    ordered = False
    if isinstance(truth, dict) and "calls" in truth:
        ordered = bool(truth.get("ordered"))
        truth = truth["calls"]
    if not isinstance(truth, list | tuple):
        raise UserError(
            'ground truth for the reward "tool_call" is a list of calls, or '
            f'{{"calls": [...], "ordered": true}}: {truth!r:.80}'
        )
    return [_read_call(call) for call in truth], ordered


def _read_call(call: Any) -> Expected:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f'a call of the reward "tool_call" has no name: {call!r:.80}')
    arguments, schema = (decode(call.get(key), "tool_call") for key in ("arguments", "schema"))
    if schema is None:
        return Expected(call["name"], arguments or {}, None)
    if arguments:
        raise UserError(
            f'a call of the reward "tool_call" has `arguments` and `schema`; give one: {call!r:.80}'
        )
    return Expected(call["name"], {}, _validator(schema))


def _validator(schema: Any) -> Draft202012Validator:
    try:
        Draft202012Validator.check_schema(schema)
        validator = Draft202012Validator(schema, registry=Registry())  # fetches nothing
        validator.is_valid({})  # follows the references that it can
    except (SchemaError, Unresolvable) as error:
        where = getattr(error, "message", None) or str(error)
        raise UserError(
            f'the schema of a "tool_call" is not a JSON Schema: {where:.200}'
        ) from error
    return validator
