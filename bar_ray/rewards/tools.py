"""The "tool_call" reward: the completion makes exactly the expected calls.

Calls are written `<tool_call>{"name": ..., "arguments": {...}}</tool_call>`. Ground truth: a list
of such calls in any order, `{"calls": [...], "ordered": true}` when the order matters, `[]` when no
call may be made. OpenAI's form (`{"function": {...}}`, arguments as JSON text) is accepted there.
Full score or none; text around the calls is ignored.
"""

import json
import re
from typing import Any

from bar_ray.rewards.compare import decode, same
from bar_ray.types import UserError, Verdict

_MARKER = re.compile(r"</?tool_call>")
_BLOCK = re.compile(r"<tool_call>((?:(?!</?tool_call>).)*)</tool_call>", re.DOTALL)

ToolCall = dict[str, Any]


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


def _count_in_place(expected: list[ToolCall], calls: list[ToolCall]) -> int:
    return sum(same(e, c) for e, c in zip(expected, calls, strict=False))


def _count_anywhere(expected: list[ToolCall], calls: list[ToolCall]) -> int:
    # Exact equality is transitive, so taking the first match never spoils another.
    left = list(calls)
    for wanted in expected:
        found = next((i for i, call in enumerate(left) if same(wanted, call)), None)
        if found is not None:
            del left[found]
    return len(calls) - len(left)


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is given twice")
    return dict(pairs)


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _read_calls(ground_truth: Any) -> tuple[list[ToolCall], bool]:
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


def _read_call(call: Any) -> ToolCall:
    if isinstance(call, dict) and isinstance(call.get("function"), dict):
        call = call["function"]
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        raise UserError(f'a call of the reward "tool_call" has no name: {call!r:.80}')
    arguments = decode(call.get("arguments") or {}, "tool_call")
    return {"name": call["name"], "arguments": arguments}
