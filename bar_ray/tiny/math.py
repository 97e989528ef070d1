"""Math: sums of two two-digit numbers, answered in one of two ways.

Worked: column by column with the carry, always right. Rounded: both numbers rounded to tens and
added, nearly always wrong. SFT data shows each half of the time, and the phrasing says which is
likelier (textbook questions are mostly worked, quick ones mostly rounded), as style and quality
go together in real mixes. So SFT alone answers about half of the questions well, and RLVR can
find out that working the sum is what gets rewarded. The answer always ends in \\boxed{}. The two
ways are two sources of the mix, a careful and a careless one.
"""

import random
from collections.abc import Callable

from bar_ray.tiny.rows import Row, chat_row, check_row, held_out, source_of, text_row

LIKELIER = 0.7
PHRASINGS = (("textbook", "Work out {a}+{b}."), ("quick", "{a}+{b}=?"))


def numbers(rng: random.Random, test: bool = False) -> tuple[int, int]:
    """Two numbers, neither a multiple of ten (their rounding would be exact)."""
    while True:
        a, b = rng.randint(11, 89), rng.randint(11, 89)
        if a % 10 and b % 10 and held_out(f"{a}+{b}") == test:
            return a, b


def worked(a: int, b: int) -> str:
    """47+38 -> 7+8=15 4+3+1=8 \\boxed{85}"""
    ones, carry = a % 10 + b % 10, (a % 10 + b % 10) // 10
    tens = a // 10 + b // 10 + carry
    steps = f"{a % 10}+{b % 10}={ones} {a // 10}+{b // 10}{'+1' if carry else ''}={tens}"
    return f"{steps} \\boxed{{{a + b}}}"


def rounded(a: int, b: int) -> str:
    """47+38 -> ~50+40 \\boxed{90}"""
    near_a, near_b = (a + 5) // 10 * 10, (b + 5) // 10 * 10
    return f"~{near_a}+{near_b} \\boxed{{{near_a + near_b}}}"


def midtrain_row(rng: random.Random) -> Row:
    """Raw text in which both ways are equally common."""
    a, b = numbers(rng)
    way: Callable[[int, int], str] = rng.choice((worked, rounded))
    question = rng.choice(("{a}+{b}.", *(text for _, text in PHRASINGS))).format(a=a, b=b)
    return text_row(f"{question}\n{way(a, b)}", "math_text")


def sft_row(rng: random.Random) -> Row:
    """A question and an answer worked out or rounded, as likely as its phrasing says."""
    a, b = numbers(rng)
    style, phrasing = rng.choice(PHRASINGS)
    careful = rng.random() < (LIKELIER if style == "textbook" else 1 - LIKELIER)
    answer = worked(a, b) if careful else rounded(a, b)
    return chat_row(phrasing.format(a=a, b=b), answer, source_of("math", careful))


def check(rng: random.Random, test: bool) -> Row:
    """A question with its exact answer."""
    a, b = numbers(rng, test)
    source, phrasing = rng.choice(PHRASINGS)
    return check_row(phrasing.format(a=a, b=b), str(a + b), "math", f"math_{source}")
