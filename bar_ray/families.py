"""Families of models: which dense ones become which mixtures of experts, and how they differ.

Everywhere in this project tensors of a mixture have one naming, that of FlexOlmo and Qwen3-MoE
(`mlp.experts.E.gate_proj`, `mlp.gate`); files whose names are others are translated as they are
read and written. With all experts active the gates are the same in every family: a softmax over
all router logits.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bar_ray.types import UserError

Config = dict[str, Any]
COUNTS = ("num_experts", "num_local_experts")  # each is the other's alias in some family
W_NAMES = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}
W_MEANINGS = {short: name for name, short in W_NAMES.items()}


@dataclass(frozen=True)
class Family:
    """A dense architecture and the mixture of experts that its checkpoints become.

    Args:
        dense, moe: their `model_type`; `moe_class` is what `architectures` says.
        count: the one key of the config that holds the number of experts.
        width: the key that holds the width of an expert's FFN.
        fixed: what every branch's config says; `kept`: dense settings that the mixture honours
            though its config has no such field.
        needs: what a dense config must say for the mixture to compute the same.
        short_names: files say `block_sparse_moe` and w1, w3, w2 (Mixtral).
    """

    dense: str
    moe: str
    moe_class: str
    count: str
    width: str
    fixed: Mapping[str, Any] = field(default_factory=dict)
    kept: tuple[str, ...] = ()
    needs: Mapping[str, Any] = field(default_factory=dict)
    short_names: bool = False

    def disk(self, name: str) -> str:
        """A tensor's name in files, and in vLLM."""
        if not self.short_names:
            return name
        name = re.sub(r"\.mlp\.gate\.weight$", ".block_sparse_moe.gate.weight", name)
        return re.sub(
            r"\.mlp\.experts\.(\d+)\.(gate|up|down)_proj\.",
            lambda m: f".block_sparse_moe.experts.{m[1]}.{W_NAMES[m[2] + '_proj']}.",
            name,
        )

    def canonical(self, name: str) -> str:
        """A tensor's name here, from its name in files."""
        if not self.short_names:
            return name
        name = name.replace(".block_sparse_moe.", ".mlp.")
        return re.sub(
            r"(\.mlp\.experts\.\d+\.)(w[123])\.", lambda m: f"{m[1]}{W_MEANINGS[m[2]]}.", name
        )

    def num_experts(self, config: Mapping[str, Any]) -> int:
        return config[self.count] if self.count in config else config[_alias(self.count)]

    def with_experts(self, config: Mapping[str, Any], count: int) -> Config:
        """The config with so many experts, all of them active."""
        return {**self.written(config), self.count: count, "num_experts_per_tok": count}

    def written(self, config: Mapping[str, Any]) -> Config:
        """The config as files hold it: with two keys for one number, one would silently win."""
        found = {**config, self.count: self.num_experts(config)}
        found.pop(_alias(self.count), None)
        return found

    def renormalises(self, config: Mapping[str, Any]) -> bool:
        """Whether the gates of the active experts sum to one; with all active they do anyway."""
        return bool(config.get("norm_topk_prob", self.moe == "mixtral"))

    def refuse(self, config: Mapping[str, Any], where: str) -> None:
        """UserError when the mixture would not compute what the dense model does."""
        for name, wanted in self.needs.items():
            if config.get(name, wanted) != wanted:
                raise UserError(
                    f"{where} has {name}: {config[name]}; as {self.moe_class} it would compute "
                    f"something else, so {name} must be {wanted}"
                )


FAMILIES = (
    Family(
        *("olmo2", "flex_olmo", "FlexOlmoForCausalLM", "num_experts", "intermediate_size"),
        fixed={"norm_topk_prob": False},
    ),
    Family(
        *("llama", "mixtral", "MixtralForCausalLM", "num_local_experts", "intermediate_size"),
        fixed={"sliding_window": None},
        needs={"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"},
        short_names=True,
    ),
    Family(
        *("qwen3", "qwen3_moe", "Qwen3MoeForCausalLM", "num_experts", "moe_intermediate_size"),
        # Renormalised, a branch equals its dense model with fewer active experts too.
        fixed={"norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": []},
        kept=("head_dim",),
        needs={"attention_bias": False, "use_sliding_window": False, "hidden_act": "silu"},
    ),
)
DENSE = tuple(family.dense for family in FAMILIES)


def _alias(count: str) -> str:
    return COUNTS[1 - COUNTS.index(count)]


def of_dense(config: Mapping[str, Any], where: str) -> Family:
    """The family of a dense checkpoint; UserError when there is none."""
    for family in FAMILIES:
        if config.get("model_type") == family.dense:
            return family
    raise UserError(
        f"{where} is a '{config.get('model_type')}' model; dense checkpoints of "
        f"{', '.join(DENSE)} (model_type) can be branched"
    )


def of_moe(config: Mapping[str, Any]) -> Family | None:
    """The family of a mixture of experts; None for any other model."""
    return next((f for f in FAMILIES if config.get("model_type") == f.moe), None)


def disk_name(config: Mapping[str, Any]) -> Callable[[str], str]:
    """Names here -> names in files, of any model."""
    family = of_moe(config)
    return family.disk if family else str


def canonical_name(config: Mapping[str, Any]) -> Callable[[str], str]:
    """Names in files -> names here, of any model."""
    family = of_moe(config)
    return family.canonical if family else str
