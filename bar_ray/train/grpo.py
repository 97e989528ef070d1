"""The policy loss of RLVR as small pure functions.

GRPO (DeepSeekMath, arXiv 2402.03300) with the changes of DAPO (2503.14476: higher upper clip,
token-level mean, groups without signal left out) and Dr.GRPO (2503.20783: no division by the
group's spread or the completion's length); GSPO (2507.18071) and CISPO (2506.13585) as objectives.

Shapes: G completions of one prompt, N completions of a batch, K completion tokens of a
micro-batch, flat.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from bar_ray.recipe import Grpo

LARGEST_LOG_RATIO = 20.0  # exp(20) is 5e8: beyond it a ratio says only that something is broken


def advantages(rewards: Sequence[float], kind: str) -> list[float]:
    """Advantages of one group: `centred` is r - mean (Dr.GRPO), `standardised` divides by std too.

    A group whose rewards are all equal has no signal: all zeros.
    """
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if kind == "centred":
        return centred
    std = (sum(a * a for a in centred) / len(centred)) ** 0.5
    return [a / (std + 1e-6) for a in centred]


def token_weights(lengths: Sequence[int], normalise: str, longest: int) -> list[float]:
    """What a token of each of the N completions of a batch counts in its loss.

    `tokens`: every token alike, 1 / sum of lengths (DAPO). `sequences`: every completion alike,
    1 / (N length) (GRPO as published, GSPO). `constant`: 1 / (N longest) with the longest
    completion allowed, so that length changes nothing (Dr.GRPO).
    """
    if normalise == "sequences":
        return [1 / (len(lengths) * max(1, length)) for length in lengths]
    if normalise == "constant":
        return [1 / (len(lengths) * longest)] * len(lengths)
    return [1 / max(1, sum(lengths))] * len(lengths)


@dataclass(frozen=True)
class PolicyTokens:
    """What the loss needs about each completion token, [K] each.

    `old` are the learner's log-probabilities before the update (equal to the current ones when
    each rollout batch makes one optimizer step), `engine` those the completion was sampled with,
    `reference` those of the model the stage began with (only with a KL penalty). `sequence`
    numbers the completion a token belongs to, `weight` is its `token_weights`.
    """

    current: torch.Tensor
    old: torch.Tensor
    engine: torch.Tensor
    advantage: torch.Tensor
    weight: torch.Tensor
    sequence: torch.Tensor
    reference: torch.Tensor | None = None


def policy_loss(
    tokens: PolicyTokens, settings: Grpo
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a micro-batch and what is worth knowing per token, [K] each.

    loss = -sum_t w_t min(exp(old_t - engine_t), tis_cap) objective_t + kl sum_t w_t KL_t

    The second factor is truncated importance sampling: engine and learner compute slightly
    different probabilities, and rollouts may come from older weights.
    """
    objective, ratio = OBJECTIVES[settings.objective](tokens, settings)
    importance = torch.exp(_bounded(tokens.old - tokens.engine))
    if settings.tis_cap:
        objective = objective * importance.clamp(max=settings.tis_cap)
    loss = -(tokens.weight * objective).sum()
    about = {"importance": importance, "ratio": ratio.detach()}
    if tokens.reference is not None:
        divergence = kl(tokens.current, tokens.reference, settings.kl_estimator)
        loss = loss + settings.kl * (tokens.weight * divergence).sum()
        about["kl"] = divergence.detach()
    return loss, about


def clipped_gain(
    tokens: PolicyTokens, settings: Grpo, log_ratio: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """GRPO: min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(current - old) of each token."""
    ratio = torch.exp(_bounded(tokens.current - tokens.old if log_ratio is None else log_ratio))
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    return torch.minimum(ratio * tokens.advantage, clipped * tokens.advantage), ratio


def sequence_gain(tokens: PolicyTokens, settings: Grpo) -> tuple[torch.Tensor, torch.Tensor]:
    """GSPO: the same with r = exp(mean over the completion of current - old) for its tokens."""
    difference = tokens.current - tokens.old
    num = int(tokens.sequence.max()) + 1 if len(difference) else 0
    total = difference.new_zeros(num).index_add(0, tokens.sequence, difference)
    count = torch.bincount(tokens.sequence, minlength=num).clamp(min=1)
    return clipped_gain(tokens, settings, (total / count)[tokens.sequence])


def weighted_logprob(tokens: PolicyTokens, settings: Grpo) -> tuple[torch.Tensor, torch.Tensor]:
    """CISPO: stop-gradient(min(r, 1 + high)) A log p; no token's gradient is clipped away."""
    ratio = torch.exp(_bounded(tokens.current - tokens.old)).detach()
    return ratio.clamp(max=1 + settings.clip_high) * tokens.advantage * tokens.current, ratio


OBJECTIVES = {"grpo": clipped_gain, "gspo": sequence_gain, "cispo": weighted_logprob}


def kl(current: torch.Tensor, reference: torch.Tensor, estimator: str) -> torch.Tensor:
    """Schulman's estimators of KL(current || reference) per sampled token, with d = ref - current.

    k1 = -d is unbiased as a number, but its gradient is 0 on average; k2 = d^2 / 2 has the right
    gradient; k3 = exp(d) - d - 1 is unbiased and never negative.
    """
    d = _bounded(reference - current)
    if estimator == "k1":
        return -d
    return d.square() / 2 if estimator == "k2" else torch.exp(d) - d - 1


def is_clipped(ratio: torch.Tensor, advantage: torch.Tensor, settings: Grpo) -> torch.Tensor:
    """Whether clipping stops a token's gradient: the ratio is outside, on the side it moves to."""
    above = (ratio > 1 + settings.clip_high) & (advantage > 0)
    below = (ratio < 1 - settings.clip_low) & (advantage < 0)
    return above | below


def _bounded(log_ratio: torch.Tensor) -> torch.Tensor:
    return log_ratio.clamp(-LARGEST_LOG_RATIO, LARGEST_LOG_RATIO)
