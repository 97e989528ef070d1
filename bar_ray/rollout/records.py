"""What travels between sampler, graders and learner: prompts, graded groups, batches.

Plain values, and one JSON line per group: the format of kept rollouts, of the pending groups in a
checkpoint, and of what a learner replays.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from bar_ray import rewards
from bar_ray.data import chat, formats
from bar_ray.types import OUTCOMES, UserError


@dataclass(frozen=True)
class Prompt:
    """One task: tokens to continue, and how to grade the continuation."""

    id: str
    source: str
    tokens: list[int]
    ground_truth: Any
    verifier: str


@dataclass(frozen=True)
class Completion:
    """One graded sample; `logprobs` are the engine's, one per token, its end token included.

    `spans` says which weights drew which tokens: (version, first token, end).
    """

    tokens: list[int]
    logprobs: list[float]
    finish: str  # "stop" or "length"
    spans: list[tuple[int, int, int]]
    reward: float
    outcome: str


@dataclass(frozen=True)
class Group:
    """All completions of one prompt. `place` is its place in the order of the whole run."""

    place: int
    prompt_id: str
    source: str
    prompt: list[int]
    completions: list[Completion]

    @property
    def oldest(self) -> int:
        """The oldest weights that drew one of its tokens."""
        return min(c.spans[0][0] for c in self.completions)

    @property
    def rewards(self) -> list[float]:
        return [c.reward for c in self.completions]

    @property
    def has_signal(self) -> bool:
        """Whether the rewards differ: else every advantage is zero."""
        return max(self.rewards) > min(self.rewards)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, record: dict[str, Any]) -> "Group":
        completions = [
            Completion(**{**c, "spans": [tuple(span) for span in c["spans"]]})
            for c in record["completions"]
        ]
        return cls(**{**record, "completions": completions})


@dataclass(frozen=True)
class Trajectory:
    """One completion as the learner sees it."""

    prompt: list[int]
    completion: list[int]
    logprobs: list[float]
    advantage: float


@dataclass(frozen=True)
class Consumed:
    """What became of a prompt: it was learned from, or its group had no signal."""

    place: int
    prompt_id: str
    learned: bool


@dataclass(frozen=True)
class RolloutBatch:
    """What one optimizer step learns from, the prompts it consumed, and numbers about it.

    `drawn` holds every group drawn for the step, those without signal too. `line` is where the
    sampler's line stood when it was made: `Sampler.restore` takes it.
    """

    step: int
    drawn: list[Group]
    metrics: dict[str, float]
    line: dict[str, Any]

    @property
    def groups(self) -> list[Group]:
        """Those to learn from."""
        return [group for group in self.drawn if group.has_signal]

    @property
    def consumed(self) -> list[Consumed]:
        return [Consumed(g.place, g.prompt_id, g.has_signal) for g in self.drawn]

    def trajectories(self, kind: str, mask_truncated: bool) -> list[Trajectory]:
        """Every completion with its advantage within its group."""
        from bar_ray.train.grpo import advantages  # learners have torch, samplers need none

        return [
            Trajectory(group.prompt, c.tokens, c.logprobs, advantage)
            for group in self.groups
            for c, advantage in zip(group.completions, advantages(group.rewards, kind), strict=True)
            if not (mask_truncated and c.finish == "length")
        ]


def check(row: dict[str, Any], uri: str, number: int) -> None:
    """Refuse a prompt whose verifier cannot work with its ground truth, saying which row."""
    try:
        rewards.validate(row["verifier"], row.get("ground_truth"))
    except UserError as error:
        raise UserError(f"{uri} row {number + 1}: {error}") from error


def load_prompts(tokenizer: Any, name: str, uri: str, longest: int) -> list[Prompt]:
    """The prompts of a source as tokens; those longer than `longest` are left out."""
    prompts = []
    for number, row in enumerate(formats.read_rows(uri, "prompts")):
        check(row, uri, number)
        tokens = chat.prompt(tokenizer, row)
        truth, identity = row.get("ground_truth"), str(row.get("id", f"{name}-{number}"))
        if len(tokens) <= longest:
            prompts.append(Prompt(identity, name, tokens, truth, row["verifier"]))
    if not prompts:
        raise UserError(f"{uri} has no prompt of at most {longest} tokens")
    return prompts


def describe(groups: list[Group], step: int) -> dict[str, float]:
    """Numbers about the groups drawn for a step."""
    if not groups:
        return {}
    every = [completion for group in groups for completion in group.completions]
    outcomes = Counter(completion.outcome for completion in every)
    ages = [step - group.oldest for group in groups]
    return {
        "reward": fmean(completion.reward for completion in every),
        **dict(_by_source(groups)),
        "zero_variance": fmean(not group.has_signal for group in groups),
        "truncated": fmean(completion.finish == "length" for completion in every),
        "length": fmean(len(completion.tokens) for completion in every),
        "staleness": fmean(ages),
        "staleness_max": max(ages),
        "versions_mixed": fmean(len(completion.spans) > 1 for completion in every),
        **{f"outcome/{name}": outcomes[name] / len(every) for name in OUTCOMES},
    }


def _by_source(groups: list[Group]) -> Iterator[tuple[str, float]]:
    for source in sorted({group.source for group in groups}):
        rewards = [r for group in groups if group.source == source for r in group.rewards]
        yield f"reward/{source}", fmean(rewards)
