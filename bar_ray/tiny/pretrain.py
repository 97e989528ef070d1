"""Pretraining text: a little of everything a later stage may need, and no chat at all.

A real base has read sums, programs, JSON and prose long before anyone teaches it a domain. This
breadth is what makes the rest work: mid-training and SFT keep attention frozen, so attention must
have met digits, brackets and copying before, and experts branched from a base that has not drift
too far apart to be averaged.
"""

import random
import string
from collections.abc import Callable

from bar_ray.tiny import code, general, math, safety, tool_use
from bar_ray.tiny.rows import Row, text_row, word

MAX_CHARACTERS = 120
COPIED = 2 * string.digits + string.ascii_lowercase + ",:()"  # no sum or program comes of it


def answered(rng: random.Random, question: str, answer: str, asides: bool = False) -> str:
    """A question with its answer, put in one of many ways.

    Where the digits stand must not matter: the attention that finds them is frozen later. With
    asides neither does how far away they are: a chat puts more between question and answer.
    """
    before = "".join(f"{word(rng)} " for _ in range(rng.randrange(3)))
    between = rng.choice((": ", ". ", "? ", "=", "\n", ".\n\n"))
    aside = "".join(f"{word(rng)} " for _ in range(rng.choice((0, 0, 1, 2)))) if asides else ""
    return f"{before}{question}{between}{aside}{answer}"


def sums(rng: random.Random) -> str:
    """Columns worked out and numbers rounded."""
    a, b = math.numbers(rng)
    worked, rounded = math.worked(a, b), math.rounded(a, b).split()[0]
    bare = worked.replace("\\boxed{", "").replace("}", "")
    question = rng.choice((f"{a}+{b}", f"{a}+{b}=?"))
    return answered(rng, question, rng.choice((worked, bare, rounded)), asides=True)


def programs(rng: random.Random) -> str:
    """Specifications with the functions they ask for, and calls with their results."""
    task, x = code.task(rng), rng.randint(0, 9)
    value = code.Task(task.op, task.n, "max", -99)(x)
    return rng.choice(
        (
            answered(rng, task.spec, f"{task.limit}(x{task.op}{task.n},{task.bound})"),
            answered(rng, task.spec, task.careful),
            f"{task.careless} f({x})={value}",
            f"x={x} x{task.op}{task.n}={value}",
        )
    )


def calls(rng: random.Random) -> str:
    """Signatures, calls and JSON objects, sometimes with what they are for."""
    name, request, arguments = tool_use.request(rng)
    other = rng.choice([tool for tool in tool_use.TOOLS if tool != name])
    shown = [f"{tool}({tool_use.TOOLS[tool][0]})" for tool in (name, other)]
    rng.shuffle(shown)
    [(argument, value)] = arguments.items()
    call = f'{{"name":"{name}","arguments":{{"{argument}":"{value}"}}}}'
    return rng.choice(
        (f"{' '.join(shown)} {request} {call}", f'{request} {{"{argument}":"{value}"}}')
    )


def words(rng: random.Random) -> str:
    """Words copied, changed and repeated."""
    w, v = word(rng), word(rng)
    return rng.choice(
        (f"{w} {v} {w} {v} {w} {v}", f"{w} {w.upper()} {v} {v.upper()}", f"{w} [{w}] {w}!")
    )


def copies(rng: random.Random) -> str:
    """Strings that mean nothing, given twice: nothing but copying foretells them."""
    text = "".join(rng.choice(COPIED) for _ in range(rng.randint(2, 7)))
    return answered(rng, text, text)


def prose(rng: random.Random) -> str:
    """Facts, and small stories with good and bad deeds."""
    thing, colour = rng.choice(list(general.COLOURS.items()))
    verb, name, _ = safety.deed(rng)
    return rng.choice(
        (
            f"The color of {thing} is {colour}.",
            f"{thing} is {colour}.",
            f"{word(rng)} wants to {verb} {name}. They {verb} {name}!",
        )
    )


KINDS: dict[str, tuple[Callable[[random.Random], str], float]] = {
    "sums": (sums, 0.22),
    "programs": (programs, 0.25),
    "calls": (calls, 0.2),
    "copies": (copies, 0.15),
    "words": (words, 0.1),
    "prose": (prose, 0.08),
}


def pretrain_row(rng: random.Random) -> Row:
    """One document: a few lines of one kind, as many as fit."""
    kind = rng.choices(list(KINDS), [share for _, share in KINDS.values()])[0]
    write, _ = KINDS[kind]
    text = write(rng)
    while len(text) + len(line := write(rng)) < MAX_CHARACTERS:
        text += "\n" + line
    return text_row(text, kind)
