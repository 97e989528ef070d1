"""Kernels in place of a Hugging Face model's own arithmetic, swapped in from outside.

Modules change their class; their parameters, and the names of these, stay. Every kernel stays
behind the module that owns its weights, so that engines which gather weights by module (ZeRO 3)
find the call where they wait for it.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.flex_olmo import modeling_flex_olmo as flex_olmo

from bar_ray.model import experts
from kernels import token_logprob
from kernels.rmsnorm import Rotary, rmsnorm


class TokenHead(nn.Linear):
    """An LM head that also tells log-probabilities of tokens without keeping logits."""

    kernels = True

    def forward(
        self, x: torch.Tensor, targets_N: torch.Tensor | None = None, temperature: float = 1.0
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Logits; with targets their log p and the entropy [N] instead, x being [N, D]."""
        if targets_N is None:
            return super().forward(x)
        form = token_logprob.token_logprob if self.kernels else token_logprob.reference
        return form(x, self.weight, targets_N, temperature)


class Norm(flex_olmo.FlexOlmoRMSNorm):
    def forward(
        self, x: torch.Tensor, residual: torch.Tensor | None = None, rotary: Rotary | None = None
    ) -> torch.Tensor:
        return rmsnorm(x, self.weight, self.variance_epsilon, residual, rotary)


class Attention(flex_olmo.FlexOlmoAttention):
    """q and k are normed and rotated in one pass."""

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: Rotary,
        attention_mask: torch.Tensor | None,
        past_key_values: Cache | None = None,
        **others,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        x_BTD = hidden_states
        q = self.q_norm(self.q_proj(x_BTD), rotary=position_embeddings)
        k = self.k_norm(self.k_proj(x_BTD), rotary=position_embeddings)
        q, k, v = (
            each.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for each in (q, k, self.v_proj(x_BTD))
        )
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, flex_olmo.eager_attention_forward
        )
        out, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **others,
        )
        return self.o_proj(out.flatten(2)), weights


class Layer(flex_olmo.FlexOlmoDecoderLayer):
    def forward(self, hidden_states: torch.Tensor, **others) -> torch.Tensor:
        attended, _ = self.self_attn(hidden_states=hidden_states, **others)
        hidden_states = self.post_attention_layernorm(attended, residual=hidden_states)
        return self.post_feedforward_layernorm(self.mlp(hidden_states), residual=hidden_states)


CLASSES = {
    flex_olmo.FlexOlmoRMSNorm: Norm,
    flex_olmo.FlexOlmoAttention: Attention,
    flex_olmo.FlexOlmoDecoderLayer: Layer,
}


def load(
    folder: str | Path, dtype: torch.dtype, top_k: int = 0, kernels: str = "auto"
) -> PreTrainedModel:
    """`experts.load`, with kernels or (`reference`) in plain torch."""
    model = experts.load(folder, dtype, top_k)
    swap(model, kernels != "reference")
    return model


def swap(model: PreTrainedModel, kernels: bool) -> None:
    """Give a model its `TokenHead`, and every kernel that fits it unless `kernels` is off."""
    model.lm_head.__class__ = TokenHead
    model.lm_head.kernels = kernels
    for block in experts.moe_blocks(model):
        block.kernels = kernels and model.config.hidden_act == "silu"
    for module in model.modules() if kernels else ():
        module.__class__ = CLASSES.get(type(module), type(module))
