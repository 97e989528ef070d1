"""Every expert active (k = E): a sum of dense gated SwiGLU FFNs, each with parameters of its own.

    y = sum_e down_e(p_e * silu(gate_e x) * up_e x)

With k = E nothing is routed, so there is no sort, no gather and no padding: two dense products per
expert, the second accumulating into y. What is frozen costs no weight gradient, and its input is
not kept. Saved are x (where a gate or up projection learns), the gates, and g, u of each expert.
"""

from collections.abc import Sequence

import torch

from kernels import swiglu_gate

Expert = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # gate [I, D], up [I, D], down [D, I]


def reference(
    x_ND: torch.Tensor, gates_NE: torch.Tensor, experts: Sequence[Expert]
) -> torch.Tensor:
    y_ND = torch.zeros_like(x_ND)
    for e, (gate, up, down) in enumerate(experts):
        h_NI = swiglu_gate.reference(x_ND @ gate.T, x_ND @ up.T, gates_NE[:, e].to(x_ND.dtype))
        y_ND = y_ND + h_NI @ down.T
    return y_ND


def expert_ffn(
    x_ND: torch.Tensor, gates_NE: torch.Tensor, experts: Sequence[Expert]
) -> torch.Tensor:
    """The output [N, D] of all experts together. Gradients are formed where asked for alone."""
    weights = [weight for expert in experts for weight in expert]
    return _ExpertFfn.apply(x_ND, gates_NE, *weights)


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, gates_NE, *weights):
        y_ND = x_ND.new_zeros(x_ND.shape)
        saved = []
        for e, (gate, up, down) in enumerate(_by_expert(weights)):
            g_NI, u_NI = x_ND @ gate.T, x_ND @ up.T
            y_ND.addmm_(swiglu_gate.forward(g_NI, u_NI, gates_NE[:, e].contiguous()), down.T)
            saved += [g_NI, u_NI]
        learns_from_x = any(
            needed for i, needed in enumerate(ctx.needs_input_grad[2:]) if i % 3 < 2
        )
        ctx.save_for_backward(x_ND if learns_from_x else None, gates_NE, *weights, *saved)
        return y_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_ND):
        x_ND, gates_NE, *rest = ctx.saved_tensors
        weights, saved = rest[: len(rest) * 3 // 5], rest[len(rest) * 3 // 5 :]
        needs_x, needs_gates, *needs = ctx.needs_input_grad
        dx_ND = torch.zeros_like(dy_ND) if needs_x else None
        dgates_NE = torch.empty_like(gates_NE, dtype=torch.float32) if needs_gates else None
        gradients: list[torch.Tensor | None] = []
        for e, (gate, up, down) in enumerate(_by_expert(weights)):
            gate_learns, up_learns, down_learns = needs[3 * e : 3 * e + 3]
            g_NI, u_NI = saved[2 * e : 2 * e + 2]
            dg_NI, du_NI, dp_N, h_NI = swiglu_gate.backward(
                dy_ND @ down, g_NI, u_NI, gates_NE[:, e].contiguous(), with_h=down_learns
            )
            if dgates_NE is not None:
                dgates_NE[:, e] = dp_N
            if dx_ND is not None:
                dx_ND.addmm_(dg_NI, gate).addmm_(du_NI, up)
            gradients += [
                dg_NI.T @ x_ND if gate_learns else None,
                du_NI.T @ x_ND if up_learns else None,
                dy_ND.T @ h_NI if down_learns else None,
            ]
        dgates_NE = None if dgates_NE is None else dgates_NE.to(gates_NE.dtype)
        return dx_ND, dgates_NE, *gradients


def _by_expert(weights: Sequence[torch.Tensor]) -> list[Expert]:
    return list(zip(weights[::3], weights[1::3], weights[2::3], strict=True))
