"""Models in training: Hugging Face models whose experts are separate parameters.

Hugging Face stacks all experts of a layer in one Parameter, so one expert cannot be frozen: the
anchor would get a gradient, a weight-gradient GEMM and optimizer state. `load` swaps each MoE block
from outside for `SplitMoe`, whose parameters have the names of `tensors` (router rows apart), and
`save` writes them back byte for byte.

Shapes: B batch, T tokens, D model width, E experts, N = B*T.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from bar_ray import families
from bar_ray.model import tensors
from bar_ray.model.tensors import Checkpoint
from kernels.expert_ffn import complement_ffn, expert_ffn


class ExpertFfn(nn.Module):
    """One SwiGLU FFN."""

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)
        self.act_fn = ACT2FN[activation]

    def forward(self, x_ND: torch.Tensor, gate_N1: torch.Tensor) -> torch.Tensor:
        # The gate is applied before the down projection: its gradient needs no output of the FFN.
        hidden = self.act_fn(self.gate_proj(x_ND)) * self.up_proj(x_ND)
        return self.down_proj(hidden * gate_N1)

    @property
    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight


class SplitRouter(nn.Module):
    """The router, one Parameter per expert, so that rows can be frozen one by one."""

    def __init__(self, num_experts: int, width: int) -> None:
        super().__init__()
        self.rows = nn.ParameterList(nn.Parameter(torch.empty(width)) for _ in range(num_experts))

    def forward(self, x_ND: torch.Tensor) -> torch.Tensor:
        return F.linear(x_ND, torch.stack(list(self.rows)))


class SplitMoe(nn.Module):
    """A MoE block over separate experts: softmax over all, the top k kept, renormed in some.

    With k = E nothing is routed: each expert is a dense FFN with a per-token gate. With k < E the
    gates of the others are zero (every expert still runs). Inside `router_logits`, `logits` is the
    router logits [N, E] of the forward pass.
    """

    def __init__(self, config) -> None:
        super().__init__()
        num_experts = config.num_local_experts
        family, settings = families.of_moe(config.to_dict()), config.to_dict()
        self.top_k = config.num_experts_per_tok
        self.renormalise = family.renormalises(settings)
        self.gate = SplitRouter(num_experts, config.hidden_size)
        self.experts = nn.ModuleList(
            ExpertFfn(config.hidden_size, settings[family.width], config.hidden_act)
            for _ in range(num_experts)
        )
        self.kernels = False
        self.keep_logits = False
        self.logits: torch.Tensor | None = None

    def forward(self, x_BTD: torch.Tensor) -> torch.Tensor:
        x_ND = x_BTD.reshape(-1, x_BTD.shape[-1])
        logits_NE = self.gate(x_ND)
        if self.keep_logits:
            self.logits = logits_NE
        return self._experts(x_ND, self.gates(logits_NE)).reshape(x_BTD.shape)

    def gates(self, logits_NE: torch.Tensor) -> torch.Tensor:
        """What each expert's output is weighted with, in fp32."""
        return gate_weights(logits_NE, self.top_k, self.renormalise)

    @property
    def uses_kernels(self) -> bool:
        return self.kernels and self.top_k >= len(self.experts) - 1

    def _experts(self, x_ND: torch.Tensor, gates_NE: torch.Tensor) -> torch.Tensor:
        if not self.uses_kernels:
            gates_NE = gates_NE.to(x_ND.dtype)
            return sum(e(x_ND, gates_NE[:, i : i + 1]) for i, e in enumerate(self.experts))
        weights = [each.weights for each in self.experts]
        if self.top_k < len(weights):
            return complement_ffn(x_ND, gates_NE, weights, gates_NE.argmin(dim=-1))
        return expert_ffn(x_ND, gates_NE, weights)


def gate_weights(logits_NE: torch.Tensor, top_k: int, renormalise: bool) -> torch.Tensor:
    """softmax over all experts in fp32, zero outside the top k."""
    probs_NE = torch.softmax(logits_NE.float(), dim=-1)
    if top_k == probs_NE.shape[-1]:
        return probs_NE
    values, kept = torch.topk(probs_NE, top_k, dim=-1)
    if renormalise:
        values = values / values.sum(dim=-1, keepdim=True)
    return torch.zeros_like(probs_NE).scatter(1, kept, values)


@contextlib.contextmanager
def router_logits(model: PreTrainedModel) -> Iterator[list[SplitMoe]]:
    """The MoE blocks, which keep the router logits of a forward pass made inside.

    Kept only here: a backward pass that recomputes activations runs the blocks again, and logits
    kept from that would hold every layer's activations in memory.
    """
    blocks = moe_blocks(model)
    for block in blocks:
        block.keep_logits = True
    try:
        yield blocks
    finally:
        for block in blocks:
            block.keep_logits, block.logits = False, None


def moe_blocks(model: PreTrainedModel) -> list[SplitMoe]:
    return [m for m in model.modules() if isinstance(m, SplitMoe)]


def load(folder: str | Path, dtype: torch.dtype, top_k: int = 0) -> PreTrainedModel:
    """A model ready for training: dense as it is, MoE with separate experts; see also `fused`.

    `top_k` replaces the checkpoint's number of active experts when it is not 0.
    """
    checkpoint = Checkpoint(folder)
    if families.of_moe(checkpoint.config) is None:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    config = AutoConfig.from_pretrained(folder)
    config.num_experts_per_tok = top_k or config.num_experts_per_tok
    model = on_meta(config, dtype)
    rotary = type(model.model.rotary_emb)(config)  # its buffers are computed, not stored
    model.to_empty(device="cpu")
    model.model.rotary_emb = rotary
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_stored(checkpoint, name))
    return model


def on_meta(config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A mixture with separate experts, without memory for its weights."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        for layer in model.model.layers:
            layer.mlp = SplitMoe(config).to(dtype)
    return model


def _stored(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    if match := tensors.ROUTER_ROW.search(name):
        return checkpoint[stacked_name(name)][int(match.group(1))]
    return checkpoint[name]


def stacked_name(name: str) -> str:
    """`...mlp.gate.rows.E` is row E of `...mlp.gate.weight`; every other name is its own."""
    return tensors.ROUTER_ROW.sub(".mlp.gate.weight", name)


def stack_routers(named: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors by parameter name, the rows of each router as one."""
    stacked: dict[str, torch.Tensor] = {}
    rows: dict[str, dict[int, torch.Tensor]] = {}
    for name, value in named.items():
        if match := tensors.ROUTER_ROW.search(name):
            rows.setdefault(stacked_name(name), {})[int(match.group(1))] = value
        else:
            stacked[name] = value
    for name, by_expert in rows.items():
        stacked[name] = torch.stack([by_expert[e] for e in sorted(by_expert)])
    return stacked


def stacked_tensors(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Every tensor of the model as a checkpoint holds it."""
    return stack_routers({name: p.detach() for name, p in model.named_parameters()})


def save(model: PreTrainedModel, folder: str | Path, side_files: str | Path | None) -> None:
    """Write the model as a Hugging Face folder; `side_files` is where its tokenizer lies."""
    write(model.config, stacked_tensors(model), folder, side_files)


def write(
    config: PreTrainedConfig,
    stored: dict[str, torch.Tensor],
    folder: str | Path,
    side_files: str | Path | None,
) -> None:
    """Write a checkpoint's tensors as a Hugging Face folder."""
    stored = {name: value.cpu() for name, value in stored.items()}
    specs = tensors.specs_of(stored)
    tensors.write(folder, config.to_dict(), specs, stored.__getitem__, side_files)
