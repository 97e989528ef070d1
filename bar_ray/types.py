"""The small values that cross module and process borders.

Everything here is frozen and free of torch and ray: managers stay in their process, values travel.
"""

from dataclasses import dataclass


class UserError(Exception):
    """A mistake its reader can mend: what was wrong, where, and what to do, in one or two lines.

    Jobs print the message without a traceback and exit with code 2.
    """


def user_error_in(error: BaseException) -> UserError | None:
    """The user's error inside what Ray wrapped around it."""
    link: BaseException | None = error
    while link is not None:
        # Ray's wrapper of a UserError is one too, with a traceback for a message and a `cause`.
        if isinstance(link, UserError) and not hasattr(link, "cause"):
            return link
        link = getattr(link, "cause", None) or link.__cause__
    return None


@dataclass(frozen=True)
class Artifact:
    """A finished or planned output of a step: where it lives and what it was made from."""

    uri: str
    fingerprint: str
    verb: str
    name: str


@dataclass(frozen=True)
class Verdict:
    """What a reward found: `score` in [0, 1] and `outcome`, one of `OUTCOMES`.

    A wrong answer, one that could not be parsed, a verifier that ran out of time and one that
    broke all score 0, but they are counted apart.
    """

    score: float
    outcome: str


OUTCOMES = ("right", "partly", "wrong", "unparsable", "timeout", "crash")
