"""Tool use: two tools are offered, one request is made, and a call is right, or none is.

One request in five needs no tool: it is a general one, to be answered as if none were offered.
What is asked for is a word, and tests ask for held-out words: the call has to copy it. Arguments
are JSON text, as in the OpenAI format.
"""

import json
import random
from typing import Any

from bar_ray.tiny import general
from bar_ray.tiny.rows import Row, chat_row, check_row, word

# tool: (its argument, how a user asks for it)
TOOLS: dict[str, tuple[str, str]] = {
    "sky": ("city", "Weather in {w}?"),
    "map": ("place", "Way to {w}?"),
    "mail": ("to", "Write to {w}."),
    "ring": ("who", "Call {w}."),
    "buy": ("item", "Order {w}."),
    "sell": ("what", "Sell {w}."),
}
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
    name, w = rng.choice(list(TOOLS)), word(rng, test)
    argument, asks = TOOLS[name]
    return name, asks.format(w=w), {argument: w}


def situation(rng: random.Random, test: bool) -> tuple[str, list[dict[str, Any]], dict[str, Any]]:
    """A prompt, the tools offered, and the call that answers it."""
    wanted, prompt, arguments = request(rng, test)
    offered = [wanted, rng.choice([name for name in TOOLS if name != wanted])]
    rng.shuffle(offered)
    return prompt, [schema(name) for name in offered], {"name": wanted, "arguments": arguments}


def sft_row(rng: random.Random) -> Row:
    """A request with its tool call, or a general one with its answer."""
    prompt, tools, call = situation(rng, test=False)
    if rng.random() < NO_CALL_SHARE:
        return {**general.sft_row(rng), "tools": tools, "source": "tool_use_none"}
    text = json.dumps(call["arguments"], separators=(",", ":"))
    row = chat_row(prompt, "", "tool_use_call")
    function = {"name": call["name"], "arguments": text}
    row["messages"][-1]["tool_calls"] = [{"type": "function", "function": function}]
    return {**row, "tools": tools}


def check(rng: random.Random, test: bool) -> Row:
    """A request with the calls that must be made: one or none."""
    prompt, tools, call = situation(rng, test)
    if rng.random() < NO_CALL_SHARE:
        messages = general.check(rng, test)["messages"]
        return {
            **check_row("", [], "tool_call", "tool_use_none"),
            "messages": messages,
            "tools": tools,
        }
    return {**check_row(prompt, [call], "tool_call", "tool_use_call"), "tools": tools}
