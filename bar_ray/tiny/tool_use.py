"""Tool use: two tools are offered, one request is made, and a call is right, or none is.

One request in five asks for a tool that is not offered: the right answer then makes no call.
Requests, not words, are held out: no training file asks for the weather in a test's city, though
some ask for the way to it. Arguments are JSON text, as in the OpenAI format.
"""

import json
import random
from typing import Any

from bar_ray.tiny.rows import PEOPLE, PLACES, THINGS, Row, chat_row, check_row, held_out

# tool: (its argument, how a user asks for it, what can be asked for)
TOOLS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "sky": ("city", "Weather in {w}?", PLACES),
    "map": ("place", "Way to {w}?", PLACES),
    "mail": ("to", "Write to {w}.", PEOPLE),
    "ring": ("who", "Call {w}.", PEOPLE),
    "buy": ("item", "Order {w}.", THINGS),
    "sell": ("what", "Sell {w}.", THINGS),
}
NO_TOOL = "No tool for that."
NO_CALL_SHARE = 0.2


def schema(name: str) -> dict[str, Any]:
    """The tool as the OpenAI format describes it."""
    argument = TOOLS[name][0]
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string"}},
        "required": [argument],
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def request(rng: random.Random, test: bool = False) -> tuple[str, str, dict[str, str]]:
    """A tool, a prompt that asks for it, and the arguments of the call."""
    while True:
        name = rng.choice(list(TOOLS))
        argument, asks, values = TOOLS[name]
        value = rng.choice(values)
        prompt = asks.format(w=value)
        if held_out(prompt) == test:
            return name, prompt, {argument: value}


def situation(rng: random.Random, test: bool) -> tuple[str, list[dict[str, Any]], dict | None]:
    """A prompt, the tools offered, and the call that answers it (None when none can)."""
    wanted, prompt, arguments = request(rng, test)
    others = rng.sample([name for name in TOOLS if name != wanted], 2)
    can_call = rng.random() >= NO_CALL_SHARE
    offered = [wanted, others[0]] if can_call else others
    rng.shuffle(offered)
    call = {"name": wanted, "arguments": arguments} if can_call else None
    return prompt, [schema(name) for name in offered], call


def sft_row(rng: random.Random) -> Row:
    """A request with its tool call, or with the answer that there is no such tool."""
    prompt, tools, call = situation(rng, test=False)
    source = "tool_use_call" if call else "tool_use_none"
    row = chat_row(prompt, "" if call else NO_TOOL, source)
    row["tools"] = tools
    if call:
        text = json.dumps(call["arguments"], separators=(",", ":"))
        function = {"name": call["name"], "arguments": text}
        row["messages"][-1]["tool_calls"] = [{"type": "function", "function": function}]
    return row


def check(rng: random.Random, test: bool) -> Row:
    """A request with the calls that must be made: one or none."""
    prompt, tools, call = situation(rng, test)
    source = "tool_use_call" if call else "tool_use_none"
    row = check_row(prompt, [call] if call else [], "tool_call", source)
    row["tools"] = tools
    return row
