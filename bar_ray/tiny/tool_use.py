"""Tool use: two tools are offered, one request is made, and a call is right, or none is.

The name of the argument differs between rows, so it has to be read from the offered tools. One
request in five asks for a tool that is not offered: the right answer then makes no call.
Arguments are JSON text, as in the OpenAI format.
"""

import json
import random
from typing import Any

from bar_ray.tiny.rows import Row, chat_row, check_row, word

# tool: (possible names of its argument, how a user asks for it)
TOOLS = {
    "sky": (("city", "place"), "Weather in {w}?"),
    "mail": (("to", "name"), "Write to {w}."),
    "ring": (("who", "name"), "Call {w}."),
    "play": (("song", "track"), "Play {w}."),
    "buy": (("item", "what"), "Order {w}."),
    "map": (("to", "place"), "Way to {w}?"),
}
NO_TOOL = "No tool for that."
NO_CALL_SHARE = 0.2


def schema(name: str, argument: str) -> dict[str, Any]:
    """The tool as the OpenAI format describes it."""
    parameters = {
        "type": "object",
        "properties": {argument: {"type": "string"}},
        "required": [argument],
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def request(rng: random.Random, test: bool) -> tuple[str, list[dict[str, Any]], dict | None]:
    """A prompt, the tools offered, and the call that answers it (None when none can)."""
    wanted, *others = rng.sample(list(TOOLS), 3)
    callable_here = rng.random() >= NO_CALL_SHARE
    offered = [wanted, others[0]] if callable_here else others
    rng.shuffle(offered)
    arguments = {name: rng.choice(TOOLS[name][0]) for name in offered}
    value = word(rng, test)
    call = {"name": wanted, "arguments": {arguments[wanted]: value}} if callable_here else None
    tools = [schema(name, argument) for name, argument in arguments.items()]
    return TOOLS[wanted][1].format(w=value), tools, call


def sft_row(rng: random.Random) -> Row:
    """A request with its tool call, or with the answer that there is no such tool."""
    prompt, tools, call = request(rng, test=False)
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
    prompt, tools, call = request(rng, test)
    source = "tool_use_call" if call else "tool_use_none"
    row = check_row(prompt, [call] if call else [], "tool_call", source)
    row["tools"] = tools
    return row
