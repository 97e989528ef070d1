"""The "instruction" reward: checks that need no judge.

Ground truth: a dict of checks that must all hold, e.g. `{"contains": ["tea"], "max_chars": 40}`.
Checks read the completion without the white space around it; an empty answer follows none.
"""

import difflib
from collections.abc import Callable
from typing import Any

from bar_ray.rewards.compare import decode
from bar_ray.types import UserError, Verdict


def _contains(text: str, wanted: Any) -> bool:
    return all(part in text for part in ([wanted] if isinstance(wanted, str) else wanted))


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "exact": lambda text, wanted: text == wanted.strip(),
    "contains": _contains,
    "starts_with": lambda text, wanted: text.startswith(wanted),
    "ends_with": lambda text, wanted: text.endswith(wanted),
    "lowercase": lambda text, wanted: not wanted or text.islower(),
    "uppercase": lambda text, wanted: not wanted or text.isupper(),
    "num_words": lambda text, wanted: len(text.split()) == wanted,
    "max_chars": lambda text, wanted: len(text) <= wanted,
}
_TYPES = {
    "contains": (str, list, tuple),
    "lowercase": (bool,),
    "uppercase": (bool,),
    "num_words": (int,),
    "max_chars": (int,),
}


def grade(completion: str, ground_truth: Any) -> Verdict:
    """Score 1 when every check holds."""
    checks = _read_checks(ground_truth)
    text = completion.strip()
    if not text:
        return Verdict(0.0, "unparsable")
    held = sum(CHECKS[name](text, wanted) for name, wanted in checks.items())
    if held == len(checks):
        return Verdict(1.0, "right")
    return Verdict(0.0, "partly" if held else "wrong")


def validate(ground_truth: Any) -> None:
    """UserError when a check does not exist or has the wrong type."""
    _read_checks(ground_truth)


def _read_checks(ground_truth: Any) -> dict[str, Any]:
    truth = decode(ground_truth, "instruction")
    if not isinstance(truth, dict):
        raise UserError(f'ground truth for the reward "instruction" is a dict: {truth!r:.80}')
    # Parquet fills the keys that other rows have with None.
    checks = {name: wanted for name, wanted in truth.items() if wanted is not None}
    if not checks:
        raise UserError('ground truth for the reward "instruction" has no check.')
    for name, wanted in checks.items():
        if name not in CHECKS:
            near = difflib.get_close_matches(name, CHECKS, 1)
            hint = f' Did you mean "{near[0]}"?' if near else ""
            raise UserError(f'no check "{name}"; known: {", ".join(CHECKS)}.{hint}')
        types = _TYPES.get(name, (str,))
        if not isinstance(wanted, types):
            raise UserError(f'check "{name}" wants {types[0].__name__}, not {wanted!r:.40}.')
    return checks
