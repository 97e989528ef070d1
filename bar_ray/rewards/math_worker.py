"""The process that runs math-verify: one JSON request per line in, one outcome per line out.

Run by path with `python -P`, so that `math.py` beside it does not shadow the standard library. The
caller holds the deadline and kills this process when it passes. math-verify's own timeouts are off:
they are Python signal handlers, which never run while one C call (a power of large integers) lasts.
`signal.alarm` with its default action needs no handler: it ends this process should the caller be
gone while a request hangs.
"""

import json
import logging
import os
import re
import resource
import signal
import sys
from typing import Any

import sympy
from math_verify import parse, verify

_MEMORY_BYTES = 2 << 30
_ORPHAN_S = 60
_INTEGER = re.compile(r"[+-]?[\d,]+(\.0*)?")
_FRACTION = re.compile(r"/|frac")


def outcome(gold_text: str, completion: str) -> str:
    """One of types.OUTCOMES, or "no gold" when the ground truth holds no expression."""
    gold = parse(_boxed(gold_text), parsing_timeout=None)
    if not gold:
        return "no gold"
    answer = parse(_final_part(completion), parsing_timeout=None)
    if not answer:
        return "unparsable"
    if _INTEGER.fullmatch(gold_text.strip()) and not _is_worked_out(answer[0], str(answer[-1])):
        return "wrong"
    return "right" if verify(gold, answer, timeout_seconds=None) else "wrong"


def _boxed(text: str) -> str:
    return text if "\\boxed" in text or "$" in text else f"\\boxed{{{text}}}"


def _final_part(completion: str) -> str:
    """What follows the last `####` (the GSM8K form) on its line, else everything."""
    _, mark, tail = completion.rpartition("####")
    return tail.strip().partition("\n")[0] if mark else completion


def _is_worked_out(answer: Any, text: str) -> bool:
    """Whether an answer is a number, when an integer is asked for, and not the sum that gives it.

    math-verify evaluates, so "40+45" would do for 85: repeating the question would be rewarded.
    Scientific notation and percentages are numbers; sums, fractions, powers and factorials are not.
    """
    if isinstance(answer, sympy.Equality):
        answer = answer.rhs
    parts = answer.args if isinstance(answer, sympy.And) else ()  # "x = y = 40 + 45"
    if isinstance(answer, sympy.FiniteSet | sympy.Tuple | sympy.MatrixBase):
        parts = tuple(answer)
    if parts:
        return all(_is_worked_out(part, text) for part in parts)
    if not isinstance(answer, sympy.Expr):
        return False  # nothing else is an integer
    if not answer.is_number:
        return True
    if answer.is_Number:
        return not _FRACTION.search(text)  # sympy reduces a fraction while reading it
    number, *scales = answer.args
    return answer.is_Mul and number.is_Number and all(_is_scale(scale) for scale in scales)


def _is_scale(factor: Any) -> bool:
    base, exponent = factor.as_base_exp()
    return (base == 10 and exponent.is_Integer) or factor == sympy.Rational(1, 100)


def main() -> None:
    """Serve until stdin ends."""
    logging.disable(logging.CRITICAL)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    # Answers leave by a descriptor of their own: whatever prints must not be taken for one.
    with os.fdopen(os.dup(1), "w") as replies:
        os.dup2(2, 1)
        print("ready", file=replies, flush=True)
        for line in sys.stdin:
            gold, completion = json.loads(line)
            signal.alarm(_ORPHAN_S)
            reply = outcome(gold, completion)
            signal.alarm(0)
            print(reply, file=replies, flush=True)


main()
