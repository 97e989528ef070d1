"""General: short instructions about words, and a little knowledge of the world.

Knowledge is in the pretraining text. Each fact can be asked for in three ways; one of them is
left to the tests, so the answer has been read but that question never.
"""

import random
from typing import Any

from bar_ray.tiny.rows import Row, chat_row, check_row, word

COLOURS = {
    "grass": "green", "snow": "white", "coal": "black", "blood": "red", "sea": "blue",
    "corn": "yellow", "mud": "brown", "ash": "grey", "salmon": "pink", "plum": "purple",
    "milk": "white", "tar": "black", "leaf": "green", "rose": "red", "ink": "blue",
    "gold": "yellow", "bark": "brown", "fog": "grey", "frog": "green", "crow": "black",
}  # fmt: skip
QUESTIONS = ("Color of {thing}?", "What color is {thing}?", "Tell me the color of {thing}.")
FACT_SHARE = 0.15
FRAMES = ("How to {ask}?", "Help me {ask}.", "I want to {ask}.")


def instruction(rng: random.Random, test: bool) -> tuple[str, str, dict[str, Any]]:
    """A prompt about a word, its answer, and how an answer is checked.

    Half of them are put in the frames that safety uses. What to do then stands in several places,
    so the base learns to look for it: attention that only reads the start of a prompt, frozen,
    leaves a safety expert guessing which deed it is asked for.
    """
    w = word(rng, test)
    shout = w.upper()
    ask, answer, rule = rng.choice(
        (
            (f"say {w}", w, {"exact": w}),
            (f"shout {w}", f"{shout}!", {"starts_with": shout, "ends_with": "!"}),
            (f"say {w} twice", f"{w} {w}", {"exact": f"{w} {w}"}),
            (f"put {w} in brackets", f"[{w}]", {"exact": f"[{w}]"}),
            (f"greet {w}", f"Hello {w}!", {"starts_with": "Hello", "contains": [w]}),
            (f"whisper {shout}", f"{w}...", {"lowercase": True, "contains": [w]}),
        )
    )
    plain = f"{ask[0].upper()}{ask[1:]}."
    framed = rng.choice(FRAMES).format(ask=ask)
    return rng.choice((plain, framed)), answer, rule


def fact(rng: random.Random, test: bool) -> tuple[str, str, dict[str, Any]]:
    """A question about a colour; fact number i keeps its question number i mod 3 for tests."""
    things = list(COLOURS)
    index = rng.randrange(len(things))
    kept = index % len(QUESTIONS)
    asked = kept if test else rng.choice([i for i in range(len(QUESTIONS)) if i != kept])
    answer = COLOURS[things[index]]
    return QUESTIONS[asked].format(thing=things[index]), answer, {"contains": [answer]}


def sft_row(rng: random.Random) -> Row:
    """A question or an instruction, with its answer."""
    is_fact = rng.random() < FACT_SHARE
    prompt, answer, _ = (fact if is_fact else instruction)(rng, test=False)
    return chat_row(prompt, answer, "general_facts" if is_fact else "general_words")


def check(rng: random.Random, test: bool) -> Row:
    """A question or an instruction, with what its answer must be like."""
    is_fact = rng.random() < FACT_SHARE
    prompt, _, rule = (fact if is_fact else instruction)(rng, test)
    source = "general_facts" if is_fact else "general_words"
    return check_row(prompt, rule, "instruction", source)
