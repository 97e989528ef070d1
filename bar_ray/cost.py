"""What training costs, from a model's config alone: FLOPs per token, and bytes in memory.

A multiplication with an addition is two FLOPs. Counted is what has to be computed: causal scores
once (half of the square), no input gradient below the lowest weight that learns, no weight gradient
of what is frozen. The backward pass of flash attention computes the scores again: 2.5 times its
forward pass. Recomputed activations and element-wise work are left out, as in published MFU.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bar_ray.recipe import Learn, Run

EIGHT_BIT_BLOCK = 256  # moments of one scale
FLASH_BACKWARD = 2.5


@dataclass(frozen=True)
class Accelerator:
    """A GPU by its data sheet: dense bfloat16 FLOP/s, memory and what it moves per second."""

    name: str
    flops: float
    memory_gib: float
    bytes_per_s: float

    @staticmethod
    def of_instance(instance: str) -> "tuple[Accelerator, int] | None":
        """What a machine of AWS or Google carries, and how many; None where it is not known."""
        if instance not in INSTANCES:
            return None
        name, count, memory_gib = INSTANCES[instance]
        return replace(ACCELERATORS[name], memory_gib=memory_gib), count


ACCELERATORS = {
    each.name: each
    for each in (
        Accelerator("A100", 312e12, 80, 2.0e12),
        Accelerator("H100", 989e12, 80, 3.35e12),
        Accelerator("H100 PCIe", 756e12, 80, 2.0e12),
        Accelerator("H200", 989e12, 141, 4.8e12),
        Accelerator("B200", 2250e12, 180, 8.0e12),
        Accelerator("L40S", 362e12, 48, 0.864e12),
        Accelerator("L4", 121e12, 24, 0.3e12),
    )
}
INSTANCES = {  # accelerator, how many, GiB of each
    "p4d.24xlarge": ("A100", 8, 40),
    "p4de.24xlarge": ("A100", 8, 80),
    "p5.4xlarge": ("H100", 1, 80),
    "p5.48xlarge": ("H100", 8, 80),
    "p5e.48xlarge": ("H200", 8, 141),
    "p5en.48xlarge": ("H200", 8, 141),
    "p6-b200.48xlarge": ("B200", 8, 180),
    "g6.12xlarge": ("L4", 4, 24),
    "g6e.12xlarge": ("L40S", 4, 48),
    "g6e.48xlarge": ("L40S", 8, 48),
    "a2-highgpu-8g": ("A100", 8, 40),
    "a2-ultragpu-8g": ("A100", 8, 80),
    "a3-highgpu-8g": ("H100", 8, 80),
    "a3-ultragpu-8g": ("H200", 8, 141),
    "g2-standard-48": ("L4", 4, 24),
}


def peak_flops(device: str) -> float:
    """Of a GPU by its name, the most exact entry; 0 where it is not known."""
    known = [name for name in ACCELERATORS if name in device]
    return ACCELERATORS[max(known, key=len)].flops if known else 0.0


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
class Memory:
    """Bytes of one worker in training."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.activations


def _query_norms(config: Mapping[str, Any]) -> int:
    """Weights of the norms of q and k in a layer: per head in Qwen 3, none in Llama."""
    match config.get("model_type"):
        case "qwen3" | "qwen3_moe":
            head_dim = config.get("head_dim")
            return 2 * (head_dim or config["hidden_size"] // config["num_attention_heads"])
        case "llama" | "mixtral":
            return 0
    return -1


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
    tied: bool = False
    query_norms: int = -1  # weights of a layer's q and k norms; -1: as wide as q and k (Olmo 2)

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
            ffn=config.get("moe_intermediate_size") or config["intermediate_size"],
            vocab=config["vocab_size"],
            experts=experts,
            active=config.get("num_experts_per_tok") or 1,
            tied=bool(config.get("tie_word_embeddings")),
            query_norms=_query_norms(config),
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

    def weights(self) -> dict[str, int]:
        """Every weight, by role."""
        found = {**self.matrices(), "norm": (2 * self.layers + 1) * self.hidden}
        norms = self._queries + self._keys if self.query_norms < 0 else self.query_norms
        found["attention"] += self.layers * norms
        if not self.tied:
            found["embedding"] = self.hidden * self.vocab
        return found

    def memory(
        self,
        learn: Learn,
        run: Run,
        seq_len: int,
        dtype: str,
        workers: int | None = None,
        optimizer: str = "adamw",
    ) -> Memory:
        """Of each worker in a training step with the kernels, as DeepSpeed holds things.

        Adam keeps two moments in fp32, beside fp32 copies of bfloat16 weights that learn; in 8 bits
        a byte for each and a scale per 256, and no copy. ZeRO 1 parts the optimizer's state among
        workers, 2 the gradients too, 3 the weights too.
        """
        sizes, workers = self.weights(), workers or run.num_workers
        learning = sum(n for role, n in sizes.items() if getattr(learn, role) > 0)
        size = 2 if dtype == "bfloat16" else 4
        stage = run.zero_stage if size == 4 else max(1, run.zero_stage)
        each_learning = 12.0 if size == 2 else 8.0
        if optimizer == "adamw_8bit":
            stage, each_learning = 0, 2 * (1 + 4 / EIGHT_BIT_BLOCK)
        parts = [workers if stage >= at else 1 for at in (3, 2, 1)]
        tokens = run.micro_batch * seq_len
        each = self.activations(learn, run.activation_checkpointing)
        return Memory(
            weights=size * sum(sizes.values()) / parts[0],
            gradients=size * learning / parts[1],
            optimizer=each_learning * learning / parts[2],
            activations=size * tokens * each,
        )

    def activations(self, learn: Learn, checkpointing: bool = False) -> float:
        """Numbers kept per token for the backward pass of the kernels, in the activations' type.

        Of a layer: q and k before and after their norms (once without any), v, what attention
        gives, the inputs of both norms and of the router, two products per active expert; the
        layer's input where attention learns. Where nothing learns below the first FFN, what is
        before it is not kept. Recomputed, a layer keeps its input, and one layer at a time the
        rest. Less than a thousandth at 7B, such as norms' fp32 factors, is left out.
        """
        times = 3 if self.query_norms else 2
        attention = times * (self._queries + self._keys) + (self.hidden if learn.attention else 0)
        layer = attention + 3 * self.hidden + 2 * self.ffn * self.active
        around = 2 * self.hidden  # the last norm's input, and the gradient of the head's
        if checkpointing:
            return self.layers * self.hidden + layer + around
        if not (learn.embedding or learn.attention):
            around -= attention + (0 if learn.norm else self.hidden)
        return self.layers * layer + around

    def kv_cache(self, tokens: int, size: int = 2) -> float:
        """Bytes of keys and values, in numbers of `size` bytes."""
        return 2.0 * size * self._keys * self.layers * tokens

    @property
    def _queries(self) -> int:
        return self.heads * self.head_dim

    @property
    def _keys(self) -> int:
        return self.kv_heads * self.head_dim
