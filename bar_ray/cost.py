"""What training costs, from a model's config alone: weights by role, and FLOPs per token.

A multiplication with an addition is two FLOPs. Counted is what has to be computed: causal scores
once (half of the square), no input gradient below the lowest weight that learns, no weight gradient
of what is frozen. The backward pass of flash attention computes the scores again: 2.5 times its
forward pass. Recomputed activations and element-wise work are left out, as in published MFU.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bar_ray.recipe import Learn

FLASH_BACKWARD = 2.5


@dataclass(frozen=True)
class Flops:
    """FLOPs per token by what they are for."""

    forward: float
    input_gradient: float
    weight_gradient: float

    @property
    def total(self) -> float:
        return self.forward + self.input_gradient + self.weight_gradient


@dataclass(frozen=True)
class Shape:
    """Sizes of a dense or mixture-of-experts decoder with gated FFNs.

    `experts` is 0 for a dense model, whose FFN counts as an expert; else the anchor is one of them.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    experts: int = 0
    active: int = 1

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "Shape":
        """From the content of a Hugging Face config.json."""
        heads, hidden = config["num_attention_heads"], config["hidden_size"]
        experts = config.get("num_experts") or config.get("num_local_experts") or 0
        return cls(
            layers=config["num_hidden_layers"],
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            ffn=config["intermediate_size"],
            vocab=config["vocab_size"],
            experts=experts,
            active=config.get("num_experts_per_tok") or 1,
        )

    def matrices(self) -> dict[str, int]:
        """Weights that tokens are multiplied with, by role; the head also where it is tied."""
        one = 3 * self.hidden * self.ffn * self.layers
        wide = (2 * self.heads + 2 * self.kv_heads) * self.head_dim
        found = {"attention": self.hidden * wide * self.layers, "lm_head": self.hidden * self.vocab}
        if not self.experts:
            return {**found, "expert": one}
        router = self.hidden * self.experts * self.layers
        return {**found, "anchor": one, "expert": one * (self.experts - 1), "router": router}

    def flops(self, learn: Learn, seq_len: int) -> Flops:
        """Of a training step, per token of a sequence of `seq_len`."""
        used = self.active / self.experts if self.experts else 1.0
        ffn = ("anchor", "expert")
        sizes = {r: n * used if r in ffn else n for r, n in self.matrices().items()}
        learns = {role: getattr(learn, role) > 0 for role in sizes}
        scores = 2.0 * seq_len * self.heads * self.head_dim * self.layers
        forward = 2 * sum(sizes.values()) + scores
        weight_gradient = 2 * sum(n for role, n in sizes.items() if learns[role])
        within = any(on for role, on in learns.items() if role != "lm_head") or learn.norm > 0
        if not within and not learn.embedding:
            return Flops(forward, 0.0, weight_gradient)
        whole = forward - scores + FLASH_BACKWARD * scores
        return Flops(forward, whole - self._unneeded(learn, sizes, scores), weight_gradient)

    def _unneeded(self, learn: Learn, sizes: Mapping[str, float], scores: float) -> float:
        """Input gradients of the first layer that lead to nothing that learns."""
        if learn.embedding:
            return 0.0
        if learn.attention:  # q, k and v need no gradient of what they project
            part = (self.heads + 2 * self.kv_heads) / (2 * self.heads + 2 * self.kv_heads)
            return part * 2 * sizes["attention"] / self.layers
        attention = 2 * sizes["attention"] + FLASH_BACKWARD * scores
        if learn.norm:  # of the norm between attention and FFN
            return attention / self.layers
        up = 2 / 3 * 2 * (sizes.get("anchor", 0.0) + sizes["expert"])  # gate and up projection
        return (attention + up + 2 * sizes.get("router", 0.0)) / self.layers
