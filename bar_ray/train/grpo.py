"""The GRPO policy loss as small pure functions (DeepSeekMath, arXiv 2402.03300; DAPO, 2503.14476).

Shapes: G completions of one prompt, K completion tokens of a micro-batch, flat.
"""

from dataclasses import dataclass

import torch

from bar_ray.recipe import Grpo


def advantages(rewards: list[float], kind: str) -> list[float]:
    """Advantages of one group: `centred` is r - mean (Dr.GRPO), `standardised` divides by std too.

    A group whose rewards are all equal has no signal: all zeros.
    """
    mean = sum(rewards) / len(rewards)
    centred = [reward - mean for reward in rewards]
    if kind == "centred":
        return centred
    std = (sum(a * a for a in centred) / len(centred)) ** 0.5
    return [a / (std + 1e-6) for a in centred]


@dataclass(frozen=True)
class PolicyTokens:
    """What the loss needs about each completion token, [K] each.

    `old` are the learner's log-probabilities before the update (equal to the current ones when
    each rollout batch makes one optimizer step), `engine` those the completion was sampled with.
    """

    current: torch.Tensor
    old: torch.Tensor
    engine: torch.Tensor
    advantage: torch.Tensor


def policy_loss(
    tokens: PolicyTokens, settings: Grpo, total_tokens: int
) -> tuple[torch.Tensor, dict[str, float]]:
    """Token-level clipped loss over the tokens of the global batch.

    -min(r A, clip(r, 1 - low, 1 + high) A) * min(exp(old - engine), cap), summed and divided by
    `total_tokens`. The last factor is truncated importance sampling: engine and learner compute
    slightly different probabilities, and rollouts may come from older weights.
    """
    ratio = torch.exp(tokens.current - tokens.old)
    clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
    gain = torch.minimum(ratio * tokens.advantage, clipped * tokens.advantage)
    importance = torch.exp(tokens.old - tokens.engine)
    if settings.tis_cap:
        gain = gain * importance.clamp(max=settings.tis_cap)
    loss = -gain.sum() / total_tokens
    gap = (tokens.old - tokens.engine).abs().sum()
    return loss, {
        "loss": float(loss.detach()),
        "gap": float(gap) / total_tokens,
        "importance": float(importance.sum()) / total_tokens,
        "importance_capped": float((importance > settings.tis_cap).sum()) / total_tokens,
        "ratio_clipped": float((ratio != clipped).sum()) / total_tokens,
        "surprise": -float(tokens.current.detach().sum()) / total_tokens,
    }
