"""Rows that repeat test prompts are found by runs of words."""

import random

import pytest

from bar_ray.data.overlap import TestPrompts, runs, words

QUESTION = "A farmer has seventeen sheep and buys twice as many goats; how many animals are there?"
OTHER = "Name the largest of the planets that are seen without a telescope from the northern sky."


def row(*texts: str) -> dict:
    return {"messages": [{"role": "user", "content": text} for text in texts]}


@pytest.fixture
def tests() -> TestPrompts:
    prompts = [("math", QUESTION), ("general", OTHER), ("math", "What is 2+3?")]
    return TestPrompts(prompts, ngram=8, overlap=0.5)


def test_case_and_punctuation_do_not_hide_a_copy(tests: TestPrompts) -> None:
    assert tests.copied(row("Hello. " + QUESTION.upper().replace(";", " -"))) == "math"
    assert tests.copied({"text": f"Chapter one. {OTHER} The end."}) == "general"


def test_half_of_the_words_in_runs_make_a_copy(tests: TestPrompts) -> None:
    first = QUESTION.split()
    assert tests.copied(row(" ".join(first[:8]))) == "", "8 of 16 words are not more than half"
    assert tests.copied(row(" ".join(first[:9]))) == "math"
    scattered = " ".join(
        word for pair in zip(first, "abcdefghijklmnop", strict=True) for word in pair
    )
    assert tests.copied(row(scattered)) == "", "all words, no run of them"
    assert tests.copied(row(" ".join(first[:8]) + " x " + " ".join(first[8:]))) == "math"


def test_a_short_prompt_is_copied_only_whole(tests: TestPrompts) -> None:
    assert tests.copied(row("what is 2 + 3")) == "math"
    assert tests.copied(row("What is 2+3? Explain.")) == ""
    assert tests.copied(row("Explain.", "What is 2+3?")) == "math"


def test_what_many_prompts_share_is_no_copy() -> None:
    opening = "Answer the following question with the letter of the right choice: "
    draw = random.Random(0)
    prompts = [
        opening + " ".join(str(draw.randrange(10**6)) for _ in range(20)) for _ in range(500)
    ]
    tests = TestPrompts([("general", each) for each in prompts], 8, 0.5)
    assert tests.copied(row(opening + "is the sky blue?")) == ""
    assert tests.copied(row("And now. " + prompts[77])) == "general"


def test_runs_depend_on_order_and_place_in_nothing_else() -> None:
    one = words("a b c d e f g h i")
    assert len(runs(one, 8)) == 2 and len(runs(one, 10)) == 0
    assert runs(words("x a b c"), 3)[1] == runs(words("a b c"), 3)[0]
    assert runs(words("a b c"), 3)[0] != runs(words("c b a"), 3)[0]


def test_no_tests_find_no_copies() -> None:
    assert TestPrompts([], 8, 0.5).copied(row(QUESTION)) == ""
    assert TestPrompts([("math", "...")], 8, 0.5).copied(row("!!!", "")) == ""
