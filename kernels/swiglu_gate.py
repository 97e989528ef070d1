"""The element-wise part of a gated SwiGLU FFN: h = p * silu(g) * u, and its backward pass.

The gate p is applied before the down projection. Its gradient then comes from what the backward
pass holds anyway, and no output of a single expert exists.
"""

import torch
import torch.nn.functional as F

from kernels.device import rows_in_cache, triton, uses_triton

if triton is not None:
    import triton.language as tl

BLOCK = 1024  # columns of a Triton program


def reference(g_NI: torch.Tensor, u_NI: torch.Tensor, p_N: torch.Tensor) -> torch.Tensor:
    return F.silu(g_NI) * u_NI * p_N[:, None]


def forward(g_NI: torch.Tensor, u_NI: torch.Tensor, p_N: torch.Tensor) -> torch.Tensor:
    """h [N, I] in the type of g. Gates are fp32 or the type of g."""
    if not uses_triton(g_NI):
        return _forward_torch(g_NI, u_NI, p_N)
    h_NI = torch.empty_like(g_NI)
    if h_NI.numel():
        width = g_NI.shape[1]
        grid = (g_NI.shape[0], triton.cdiv(width, BLOCK))
        _forward[grid](g_NI, u_NI, p_N, h_NI, width, BLOCK=BLOCK)
    return h_NI


def backward(
    dh_NI: torch.Tensor,
    g_NI: torch.Tensor,
    u_NI: torch.Tensor,
    p_N: torch.Tensor,
    with_h: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Gradients of g, u [N, I] and p [N] (fp32), and h once more where its product is needed."""
    if not uses_triton(g_NI):
        return _backward_torch(dh_NI, g_NI, u_NI, p_N, with_h)
    dg_NI, du_NI = torch.empty_like(g_NI), torch.empty_like(u_NI)
    dp_N = torch.zeros(len(p_N), dtype=torch.float32, device=p_N.device)
    h_NI = torch.empty_like(g_NI) if with_h else None
    if dh_NI.numel():
        tensors = (dh_NI, g_NI, u_NI, p_N, dg_NI, du_NI, dp_N, dg_NI if h_NI is None else h_NI)
        _backward[(len(p_N),)](*tensors, g_NI.shape[1], WITH_H=with_h, BLOCK=BLOCK)
    return dg_NI, du_NI, dp_N, h_NI


def _forward_torch(g_NI: torch.Tensor, u_NI: torch.Tensor, p_N: torch.Tensor) -> torch.Tensor:
    h_NI = torch.empty_like(g_NI)
    for rows in _in_cache(g_NI):
        torch.mul(F.silu(g_NI[rows]), u_NI[rows], out=h_NI[rows])
        h_NI[rows].mul_(p_N[rows, None])
    return h_NI


def _backward_torch(
    dh_NI: torch.Tensor, g_NI: torch.Tensor, u_NI: torch.Tensor, p_N: torch.Tensor, with_h: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    dg_NI, du_NI = torch.empty_like(g_NI), torch.empty_like(u_NI)
    dp_N = torch.empty(len(p_N), dtype=torch.float32)
    h_NI = torch.empty_like(g_NI) if with_h else None
    for rows in _in_cache(g_NI):
        dh, g, u, p = dh_NI[rows], g_NI[rows], u_NI[rows], p_N[rows, None].to(g_NI.dtype)
        silu = F.silu(g)
        active = silu * u
        torch.sum(dh * active, dim=-1, dtype=torch.float32, out=dp_N[rows])
        gated = dh * p
        torch.mul(gated, silu, out=du_NI[rows])
        torch.ops.aten.silu_backward.grad_input(gated.mul_(u), g, grad_input=dg_NI[rows])
        if h_NI is not None:
            torch.mul(active, p, out=h_NI[rows])
    return dg_NI, du_NI, dp_N, h_NI


def _in_cache(tensor: torch.Tensor) -> list[slice]:
    return rows_in_cache(len(tensor), tensor.element_size() * tensor.shape[1])


if triton is not None:

    @triton.jit
    def _forward(g_ptr, u_ptr, p_ptr, h_ptr, width, BLOCK: tl.constexpr):
        row = tl.program_id(0).to(tl.int64)
        at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = at < width
        place = row * width + at
        g = tl.load(g_ptr + place, inside, 0.0).to(tl.float32)
        u = tl.load(u_ptr + place, inside, 0.0).to(tl.float32)
        p = tl.load(p_ptr + row).to(tl.float32)
        tl.store(h_ptr + place, (p * g * tl.sigmoid(g) * u).to(h_ptr.dtype.element_ty), inside)

    @triton.jit
    def _backward(
        dh_ptr,
        g_ptr,
        u_ptr,
        p_ptr,
        dg_ptr,
        du_ptr,
        dp_ptr,
        h_ptr,
        width,
        WITH_H: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        p = tl.load(p_ptr + row).to(tl.float32)
        dp = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            at = start + tl.arange(0, BLOCK)
            inside = at < width
            place = row * width + at
            dh = tl.load(dh_ptr + place, inside, 0.0).to(tl.float32)
            g = tl.load(g_ptr + place, inside, 0.0).to(tl.float32)
            u = tl.load(u_ptr + place, inside, 0.0).to(tl.float32)
            s = tl.sigmoid(g)
            silu = g * s
            dp += dh * silu * u
            gated = dh * p
            slope = s + silu * (1 - s)
            tl.store(dg_ptr + place, (gated * u * slope).to(dg_ptr.dtype.element_ty), inside)
            tl.store(du_ptr + place, (gated * silu).to(du_ptr.dtype.element_ty), inside)
            if WITH_H:
                tl.store(h_ptr + place, (p * silu * u).to(h_ptr.dtype.element_ty), inside)
        tl.store(dp_ptr + row, tl.sum(dp))
