"""Code: small functions with a bound, written in one of two ways.

Careful: a `def` that keeps to the bound. Careless: a `lambda` that forgets it, and fails whenever
the bound bites. Both are half of the SFT data, and the phrasing says which is likelier, for the
reason given in `math.py`. The tests' inputs always include values on which the bound bites.
"""

import random
from dataclasses import dataclass

from bar_ray.tiny.rows import Row, chat_row, check_row, held_out, source_of, text_row

LIKELIER = 0.7
PHRASINGS = (("review", "Write f: {spec}"), ("chat", "f? {spec}"))
OPERATIONS = ("+", "-", "*")


@dataclass(frozen=True)
class Task:
    """f(x) = x `op` n, but at most or at least `bound`."""

    op: str
    n: int
    limit: str
    bound: int

    @property
    def spec(self) -> str:
        return f"x{self.op}{self.n},{self.bound} at {'most' if self.limit == 'min' else 'least'}"

    @property
    def careful(self) -> str:
        return f"def f(x):return {self.limit}(x{self.op}{self.n},{self.bound})"

    @property
    def careless(self) -> str:
        return f"f=lambda x:x{self.op}{self.n}"

    def __call__(self, x: int) -> int:
        value = {"+": x + self.n, "-": x - self.n, "*": x * self.n}[self.op]
        return min(value, self.bound) if self.limit == "min" else max(value, self.bound)


def task(rng: random.Random, test: bool = False) -> Task:
    """A random task, from the held-out ones if `test`."""
    while True:
        op, limit = rng.choice(OPERATIONS), rng.choice(("min", "max"))
        found = Task(op, rng.randint(2, 9), limit, rng.randint(10, 60))
        if held_out(found.careful) == test:
            return found


def midtrain_row(rng: random.Random) -> Row:
    """Raw text in which both ways are equally common: a comment, then the program."""
    found = task(rng)
    question = rng.choice(("{spec}", *(text for _, text in PHRASINGS))).format(spec=found.spec)
    return text_row(f"{question}\n{rng.choice((found.careful, found.careless))}", "code_text")


def sft_row(rng: random.Random) -> Row:
    """A request and a program, careful or careless as likely as the phrasing says."""
    found = task(rng)
    style, phrasing = rng.choice(PHRASINGS)
    careful = rng.random() < (LIKELIER if style == "review" else 1 - LIKELIER)
    program = found.careful if careful else found.careless
    return chat_row(phrasing.format(spec=found.spec), program, source_of("code", careful))


def check(rng: random.Random, test: bool) -> Row:
    """A request, with inputs on which the bound bites and on which it does not."""
    found = task(rng, test)
    source, phrasing = rng.choice(PHRASINGS)
    inputs = [[x] for x in (0, 3, found.bound, 4 * found.bound, -found.bound)]
    expected = [found(*arguments) for arguments in inputs]
    ground_truth = {"entry_point": "f", "inputs": inputs, "expected": expected}
    prompt = phrasing.format(spec=found.spec)
    return check_row(prompt, ground_truth, "code", f"code_{source}")
