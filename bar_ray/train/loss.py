"""Losses as pure functions of a model and a micro-batch.

Sums, not means, leave here: the caller divides by the token count of the global batch, so the
result does not depend on how rows fall into micro-batches and workers.

Models come from `model.fused`. Shapes: M rows, S tokens, K places with loss, N = M*S, E experts.
"""

import contextlib
from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from bar_ray.data.batches import MicroBatch
from bar_ray.model.experts import SplitMoe, router_logits


def token_logprobs(
    model: PreTrainedModel, batch: MicroBatch, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(token | tokens before it in its document) at each place with loss, and the entropy.

    Both flat [K], fp32, nats; the entropy without gradient.
    """
    hidden_MSD = model.model(
        input_ids=batch.tokens_MS, position_ids=batch.positions_MS, use_cache=False
    ).last_hidden_state
    wanted_MS = batch.loss_MS[:, 1:].bool()
    targets_K = batch.tokens_MS[:, 1:][wanted_MS]
    return model.lm_head(hidden_MSD[:, :-1][wanted_MS], targets_K, temperature)


def router_z(blocks: Sequence[SplitMoe]) -> torch.Tensor:
    """Sum over tokens of the layers' mean squared logsumexp of router logits (ST-MoE z-loss)."""
    squares = [torch.logsumexp(block.logits.float(), dim=-1).square().sum() for block in blocks]
    return sum(squares) / len(blocks)


def language_model_loss(
    model: PreTrainedModel, batch: MicroBatch, loss_tokens: int, tokens: int, z_weight: float
) -> tuple[torch.Tensor, dict[str, float]]:
    """Cross-entropy per loss token of the global batch, plus the router z-loss per token."""
    with router_logits(model) if z_weight else contextlib.nullcontext([]) as blocks:
        cross_entropy = -token_logprobs(model, batch)[0].sum() / loss_tokens
        total = cross_entropy
        if blocks and batch.counts:
            total = total + z_weight * router_z(blocks) / tokens
    return total, {"loss": float(cross_entropy.detach())}
