"""Log-probabilities of given tokens over a large vocabulary, without keeping logits.

    z = x W^T / temperature      logp = z[target] - logsumexp(z)

Rows are taken in chunks; logits, their softmax and the gradient of x live for one chunk only, in
fp32. With a frozen head one pass suffices: d logp / d x = (W[target] - softmax(z) W) / temperature
does not depend on the loss, so it is formed in the forward pass and scaled in the backward pass.
A head that learns needs d loss / d logp for its own gradient: `logprob_loss` has it in the forward
pass, as the loss of a token depends on nothing but its own log-probability.
"""

from collections.abc import Callable

import torch

CHUNK_BYTES = 64 * 2**20  # of fp32 logits


def reference(
    x_ND: torch.Tensor, w_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    logs_NV = torch.log_softmax((x_ND @ w_VD.T).float() / temperature, dim=-1)
    logp_N = logs_NV.gather(1, targets_N[:, None])[:, 0]
    return logp_N, -(logs_NV.exp() * logs_NV).sum(-1)


def token_logprob(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    chunk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) [N], differentiable in x, and the entropy [N], not; fp32, nats.

    The head is taken as frozen: use `logprob_loss` where it learns.
    """
    if w_VD.requires_grad and torch.is_grad_enabled():
        raise ValueError("token_logprob gives no gradient to a head: use logprob_loss")
    return _FrozenHead.apply(x_ND, w_VD, targets_N, temperature, chunk)


def logprob_loss(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    targets_N: torch.Tensor,
    loss_of: Callable[[torch.Tensor, slice], torch.Tensor],
    temperature: float = 1.0,
    chunk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sum of `loss_of(logp, rows)`, differentiable in x and W; logp and entropy [N], not.

    `loss_of` gives each token's loss from its log-probability alone; `rows` says which tokens.
    """
    return _Loss.apply(x_ND, w_VD, targets_N, loss_of, temperature, chunk)


def _chunks(x_ND: torch.Tensor, w_VD: torch.Tensor, chunk: int) -> list[slice]:
    rows = chunk or max(16, CHUNK_BYTES // (4 * len(w_VD)))
    return [slice(at, min(at + rows, len(x_ND))) for at in range(0, len(x_ND), rows)]


def _distribution(
    x_ND: torch.Tensor, w_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """softmax [N, V], log p(target) and entropy [N] of a chunk."""
    z_NV = (x_ND @ w_VD.T).float()
    if temperature != 1.0:
        z_NV.div_(temperature)
    log_total_N = torch.logsumexp(z_NV, dim=-1)
    chosen_N = z_NV.gather(1, targets_N[:, None])[:, 0]
    p_NV = torch.exp(z_NV - log_total_N[:, None])
    mean_N = torch.linalg.vecdot(p_NV, z_NV)
    return p_NV, chosen_N - log_total_N, log_total_N - mean_N


def _minus_softmax(p_NV: torch.Tensor, targets_N: torch.Tensor) -> torch.Tensor:
    """d logp / d z, in place of the softmax."""
    p_NV.neg_()
    p_NV[torch.arange(len(p_NV), device=p_NV.device), targets_N] += 1
    return p_NV


class _FrozenHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_VD, targets_N, temperature, chunk):
        logp_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        entropy_N = torch.empty_like(logp_N)
        dx_ND = torch.empty_like(x_ND) if ctx.needs_input_grad[0] else None
        for rows in _chunks(x_ND, w_VD, chunk):
            p_NV, logp_N[rows], entropy_N[rows] = _distribution(
                x_ND[rows], w_VD, targets_N[rows], temperature
            )
            if dx_ND is not None:
                dz_NV = _minus_softmax(p_NV, targets_N[rows]).div_(temperature)
                torch.mm(dz_NV.to(x_ND.dtype), w_VD, out=dx_ND[rows])
        ctx.save_for_backward(dx_ND)
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlogp_N, _):
        (dx_ND,) = ctx.saved_tensors
        return (dx_ND * dlogp_N[:, None]).to(dx_ND.dtype), None, None, None, None


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_VD, targets_N, loss_of, temperature, chunk):
        needs_x, needs_w, *_ = ctx.needs_input_grad
        total = x_ND.new_zeros((), dtype=torch.float32)
        logp_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        entropy_N = torch.empty_like(logp_N)
        dx_ND = torch.empty_like(x_ND) if needs_x else None
        dw_VD = torch.zeros_like(w_VD, dtype=torch.float32) if needs_w else None
        for rows in _chunks(x_ND, w_VD, chunk):
            p_NV, logp_N[rows], entropy_N[rows] = _distribution(
                x_ND[rows], w_VD, targets_N[rows], temperature
            )
            with torch.enable_grad():
                own_N = logp_N[rows].detach().requires_grad_()
                loss = loss_of(own_N, rows).sum(dtype=torch.float32)
                (slope_N,) = torch.autograd.grad(loss, own_N)
            total += loss.detach()
            dz_NV = _minus_softmax(p_NV, targets_N[rows]).mul_(slope_N[:, None] / temperature)
            dz_NV = dz_NV.to(x_ND.dtype)
            if dx_ND is not None:
                torch.mm(dz_NV, w_VD, out=dx_ND[rows])
            if dw_VD is not None:
                dw_VD += dz_NV.T @ x_ND[rows]
        ctx.save_for_backward(dx_ND, None if dw_VD is None else dw_VD.to(w_VD.dtype))
        ctx.mark_non_differentiable(logp_N, entropy_N)
        return total, logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss, *_):
        scaled = (None if d is None else d * dloss.to(d.dtype) for d in ctx.saved_tensors)
        return *scaled, None, None, None, None
