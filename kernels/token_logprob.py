"""Log-probabilities of given tokens over a large vocabulary, without keeping logits.

    z = x W^T / temperature      logp = z[target] - logsumexp(z)
    d logp / d x = (W[target] - softmax(z) W) / temperature

Rows are taken in chunks; logits and their softmax live for one chunk only, in fp32. With a frozen
head the gradient of x is formed in the forward pass, as it only has to be scaled by the slope of
the loss later: logits are computed once, whatever the loss. A head that learns needs the slope for
its own gradient: where one chunk holds all rows their softmax is kept for the backward pass, and
else logits are computed again there, some tokens of the vocabulary at a time, so that each row of
the head's gradient is formed once.
"""

import torch

CHUNK_BYTES = {"cpu": 16 * 2**20, "cuda": 512 * 2**20}  # of fp32 logits


def reference(
    x_ND: torch.Tensor, w_VD: torch.Tensor, targets_N: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) and entropy [N], all logits at once."""
    logs_NV = torch.log_softmax((x_ND @ w_VD.T).float() / temperature, dim=-1)
    entropy_N = -(logs_NV.exp() * logs_NV).sum(-1).detach()
    return logs_NV.gather(1, targets_N[:, None])[:, 0], entropy_N


def token_logprob(
    x_ND: torch.Tensor,
    w_VD: torch.Tensor,
    targets_N: torch.Tensor,
    temperature: float = 1.0,
    chunk: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """log p(target) [N], differentiable, and the entropy [N], not; fp32, nats.

    `chunk` is the rows taken at once; 0 chooses by size and device.
    """
    if not chunk:
        room = CHUNK_BYTES.get(x_ND.device.type, CHUNK_BYTES["cpu"])
        room *= 3 if x_ND.dtype == torch.float32 else 1  # whose products of few rows are slow
        chunk = max(16, room // (4 * len(w_VD)))
    return _LogProb.apply(x_ND, w_VD, targets_N, temperature, chunk)


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_ND, w_VD, targets_N, temperature, chunk):
        needs_x, needs_w, *_ = ctx.needs_input_grad
        logp_N = x_ND.new_empty(len(x_ND), dtype=torch.float32)
        entropy_N, total_N = torch.empty_like(logp_N), torch.empty_like(logp_N)
        dx_ND = torch.empty_like(x_ND) if needs_x and not needs_w else None
        is_kept, error_NV = needs_w and len(x_ND) <= chunk, None
        for rows in _chunks(len(x_ND), chunk):
            z_NV, targets = _logits(x_ND[rows], w_VD, temperature), targets_N[rows]
            most_N1 = z_NV.amax(-1, keepdim=True)
            p_NV = torch.exp(z_NV.sub_(most_N1))
            sum_N = p_NV.sum(-1)
            log_N = sum_N.log()
            logp_N[rows] = z_NV.gather(1, targets[:, None])[:, 0] - log_N
            total_N[rows] = log_N + most_N1[:, 0]
            entropy_N[rows] = log_N - z_NV.mul_(p_NV).sum(-1) / sum_N
            del z_NV
            p_NV.div_(sum_N[:, None])
            if dx_ND is not None:
                torch.mm(_error(p_NV, targets, x_ND.dtype), w_VD, out=dx_ND[rows])
            elif is_kept:
                error_NV = _error(p_NV, targets, x_ND.dtype)
        if needs_w:
            ctx.save_for_backward(x_ND, w_VD, targets_N, total_N, error_NV)
        else:
            ctx.save_for_backward(dx_ND)
        ctx.head_learns, ctx.temperature, ctx.chunk = needs_w, temperature, chunk
        ctx.mark_non_differentiable(entropy_N)
        return logp_N, entropy_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, slope_N, _):
        scale_N1 = slope_N[:, None] / -ctx.temperature
        if not ctx.head_learns:
            (dx_ND,) = ctx.saved_tensors
            return (dx_ND * scale_N1).to(dx_ND.dtype), None, None, None, None
        x_ND, w_VD, targets_N, total_N, error_NV = ctx.saved_tensors
        dx_ND = torch.zeros_like(x_ND, dtype=torch.float32) if ctx.needs_input_grad[0] else None
        scaled_ND, dw_VD = (x_ND * scale_N1).to(x_ND.dtype), torch.zeros_like(w_VD)
        wide = len(w_VD) if len(x_ND) <= ctx.chunk else ctx.chunk * len(w_VD) // len(x_ND)
        for some in _chunks(len(w_VD), max(16, wide)):
            error = error_NV
            if error is None:
                p_NV = _logits(x_ND, w_VD[some], ctx.temperature).sub_(total_N[:, None]).exp_()
                error = _error(p_NV, targets_N - some.start, x_ND.dtype)
            if dx_ND is not None:
                _add_product(dx_ND, error, w_VD[some])
            torch.mm(error.T, scaled_ND, out=dw_VD[some])
        if dx_ND is not None:
            dx_ND = dx_ND.mul_(scale_N1).to(x_ND.dtype)
        return dx_ND, dw_VD, None, None, None


def _chunks(count: int, chunk: int) -> list[slice]:
    return [slice(at, min(at + chunk, count)) for at in range(0, count, chunk)]


def _logits(x_ND: torch.Tensor, w_VD: torch.Tensor, temperature: float) -> torch.Tensor:
    if x_ND.is_cuda and x_ND.dtype != torch.float32:
        z_NV = torch.mm(x_ND, w_VD.T, out_dtype=torch.float32)
    else:
        z_NV = (x_ND @ w_VD.T).float()
    return z_NV if temperature == 1.0 else z_NV.div_(temperature)


def _error(p_NV: torch.Tensor, targets_N: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """softmax - onehot(target), that is -d logp / d z; in place of the softmax where it can be.

    Targets beyond the columns are of other columns.
    """
    is_here = (targets_N >= 0) & (targets_N < p_NV.shape[1])
    taken = is_here.to(p_NV.dtype)[:, None]
    return p_NV.scatter_add_(1, targets_N.where(is_here, 0)[:, None], -taken).to(dtype)


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """total += a b, with total in fp32."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += a @ b
