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
    return _of_rows(x_ND, gates_NE, experts, [(e, slice(None)) for e in range(len(experts))])


def complement_ffn(
    x_ND: torch.Tensor, gates_NE: torch.Tensor, experts: Sequence[Expert], left_out_N: torch.Tensor
) -> torch.Tensor:
    """The same where each token leaves one expert out (k = E - 1).

    Tokens are sorted by the expert they leave out, so that every expert's tokens are two slices:
    each token is moved once, not k times, and no product is wasted on it. Waits for the device to
    say where the slices end.
    """
    order_N = torch.argsort(left_out_N, stable=True)
    counts = torch.bincount(left_out_N, minlength=len(experts)).tolist()
    parts, start = [], 0
    for e, count in enumerate(counts):
        parts += [(e, slice(0, start)), (e, slice(start + count, len(x_ND)))]
        start += count
    parts = [(e, rows) for e, rows in parts if rows.stop > rows.start]
    y_ND = _of_rows(x_ND[order_N], gates_NE[order_N], experts, parts)
    return torch.empty_like(y_ND).index_copy(0, order_N, y_ND)


Parts = Sequence[tuple[int, slice]]  # which expert takes which rows


def _of_rows(
    x_ND: torch.Tensor, gates_NE: torch.Tensor, experts: Sequence[Expert], parts: Parts
) -> torch.Tensor:
    return _ExpertFfn.apply(x_ND, gates_NE, parts, *(w for expert in experts for w in expert))


class _ExpertFfn(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, gates_NE, parts, *weights):
        y_ND, experts = x_ND.new_zeros(x_ND.shape), _by_expert(weights)
        saved = []
        for e, rows in parts:
            gate, up, down = experts[e]
            g_NI, u_NI = x_ND[rows] @ gate.T, x_ND[rows] @ up.T
            h_NI = swiglu_gate.forward(g_NI, u_NI, gates_NE[rows, e].contiguous())
            y_ND[rows].addmm_(h_NI, down.T)
            saved += [g_NI, u_NI]
        learns_from_x = any(needs for i, needs in enumerate(ctx.needs_input_grad[3:]) if i % 3 < 2)
        ctx.parts = parts
        ctx.save_for_backward(x_ND if learns_from_x else None, gates_NE, *weights, *saved)
        return y_ND

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_ND):
        x_ND, gates_NE, *rest = ctx.saved_tensors
        split = len(rest) - 2 * len(ctx.parts)
        experts, saved = _by_expert(rest[:split]), rest[split:]
        needs_x, needs_gates, _, *needs = ctx.needs_input_grad
        dx_ND = torch.zeros_like(dy_ND) if needs_x else None
        dgates_NE = torch.zeros_like(gates_NE, dtype=torch.float32) if needs_gates else None
        gradients: list[torch.Tensor | None] = [None] * split

        def learn(place: int, d_NO: torch.Tensor, into_NI: torch.Tensor) -> None:
            known = gradients[place]
            if known is None:
                gradients[place] = d_NO.T @ into_NI
            else:
                known.addmm_(d_NO.T, into_NI)

        for part, (e, rows) in enumerate(ctx.parts):
            gate, up, down = experts[e]
            g_NI, u_NI = saved[2 * part : 2 * part + 2]
            gate_learns, up_learns, down_learns = needs[3 * e : 3 * e + 3]
            p_N = gates_NE[rows, e].contiguous()
            dh_NI = dy_ND[rows] @ down
            dg_NI, du_NI, dp_N, h_NI = swiglu_gate.backward(dh_NI, g_NI, u_NI, p_N, down_learns)
            if dgates_NE is not None:
                dgates_NE[rows, e] = dp_N
            if dx_ND is not None:
                dx_ND[rows].addmm_(dg_NI, gate).addmm_(du_NI, up)
            if gate_learns:
                learn(3 * e, dg_NI, x_ND[rows])
            if up_learns:
                learn(3 * e + 1, du_NI, x_ND[rows])
            if down_learns:
                learn(3 * e + 2, dy_ND[rows], h_NI)
        for place, weight in enumerate(rest[:split]):
            if needs[place] and gradients[place] is None:  # no token took this expert
                gradients[place] = torch.zeros_like(weight)
        dgates_NE = None if dgates_NE is None else dgates_NE.to(gates_NE.dtype)
        return dx_ND, dgates_NE, None, *gradients


def _by_expert(weights: Sequence[torch.Tensor]) -> list[Expert]:
    return list(zip(weights[::3], weights[1::3], weights[2::3], strict=True))
