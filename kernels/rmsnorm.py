"""RMSNorm over the last dimension, perhaps with what stands beside it in a post-norm block.

    z = w * x / sqrt(mean(x^2) + eps)      y = z, residual + z, or z rotated (RoPE, by halves)

One pass over memory each way, in fp32; on CPU by rows that stay in the cache. The backward pass
keeps x and one number per row: with n = x / sqrt(mean(x^2) + eps) and dn = w dz,

    dx = (dn - n mean(dn n)) / sqrt(mean(x^2) + eps)      dw = sum over rows of dz n

dw is formed only where w learns, from partial sums that do not depend on the order of blocks.

Shapes: N rows, W width, H head size; cos and sin [N, H].
"""

import torch

from kernels.device import rows_in_cache, triton, uses_triton

if triton is not None:
    import triton.language as tl

PROGRAMS = 512  # of the backward pass, which sums dw over their rows
Rotary = tuple[torch.Tensor, torch.Tensor]  # cos, sin


def reference(
    x: torch.Tensor,
    w_W: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    rotary: Rotary | None = None,
) -> torch.Tensor:
    wide = x.float() if x.dtype != torch.float64 else x
    z = w_W * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps))
    if rotary is not None:
        z = rotate(z, *rotary)
    return z.to(x.dtype) if residual is None else residual + z.to(x.dtype)


def rotate(z: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Each head's halves as pairs, turned by their angles."""
    heads = z.unflatten(-1, (-1, cos.shape[-1]))
    first, second = heads.chunk(2, dim=-1)
    turned = torch.cat((-second, first), dim=-1)
    return (heads * cos.unsqueeze(-2) + turned * sin.unsqueeze(-2)).flatten(-2)


def rmsnorm(
    x: torch.Tensor,
    w_W: torch.Tensor,
    eps: float,
    residual: torch.Tensor | None = None,
    rotary: Rotary | None = None,
) -> torch.Tensor:
    """y in the type and shape of x; not with both a residual and a rotation."""
    flat = x.reshape(-1, x.shape[-1])
    rest = None if residual is None else residual.reshape(flat.shape)
    tables = [None, None]
    if rotary is not None:
        tables = [each.expand(*x.shape[:-1], -1).flatten(0, -2) for each in rotary]
    return _RmsNorm.apply(flat, w_W, eps, rest, *tables).view(x.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NW, w_W, eps, residual_NW, cos_NH, sin_NH):
        form = _forward_triton if uses_triton(x_NW) else _forward_torch
        y_NW, inverse_N = form(x_NW, w_W, eps, residual_NW, cos_NH, sin_NH)
        ctx.save_for_backward(x_NW, w_W, inverse_N, cos_NH, sin_NH)
        ctx.residual = residual_NW is not None
        return y_NW

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_NW):
        form = _backward_triton if uses_triton(dy_NW) else _backward_torch
        dx_NW, dw_W = form(dy_NW, *ctx.saved_tensors, ctx.needs_input_grad[1])
        return dx_NW, dw_W, None, dy_NW if ctx.residual else None, None, None


def _forward_torch(
    x_NW: torch.Tensor,
    w_W: torch.Tensor,
    eps: float,
    rest_NW: torch.Tensor | None,
    cos_NH: torch.Tensor | None,
    sin_NH: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    y_NW = torch.empty_like(x_NW, memory_format=torch.contiguous_format)
    inverse_N = torch.empty(len(x_NW), dtype=_wide(x_NW))
    for rows in _in_cache(x_NW):
        x = x_NW[rows].to(inverse_N.dtype)
        z = x.square()
        inverse = torch.mean(z, -1, out=inverse_N[rows]).add_(eps).rsqrt_()
        torch.mul(x, inverse[:, None], out=z).mul_(w_W)
        if cos_NH is not None:
            z = _turned(z, cos_NH[rows], sin_NH[rows])
        y_NW[rows] = z
        if rest_NW is not None:
            y_NW[rows] += rest_NW[rows]
    return y_NW, inverse_N


def _backward_torch(
    dy_NW: torch.Tensor,
    x_NW: torch.Tensor,
    w_W: torch.Tensor,
    inverse_N: torch.Tensor,
    cos_NH: torch.Tensor | None,
    sin_NH: torch.Tensor | None,
    learns: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dx_NW = torch.empty_like(x_NW, memory_format=torch.contiguous_format)
    w = w_W.to(inverse_N.dtype)
    dw_W = torch.zeros_like(w) if learns else None
    for rows in _in_cache(x_NW):
        dz, x = dy_NW[rows].to(w.dtype), x_NW[rows].to(w.dtype)
        inverse = inverse_N[rows]
        if cos_NH is not None:
            dz = _turned(dz, cos_NH[rows], sin_NH[rows], back=True)
        product = dz * x
        slope = torch.mv(product, w).mul_(inverse**3).div_(-len(w))
        if dw_W is not None:
            dw_W += torch.mv(product.T, inverse)
        dn = torch.mul(dz, w, out=product).mul_(inverse[:, None])
        dx_NW[rows] = dn.addcmul_(x, slope[:, None])
    return dx_NW, None if dw_W is None else dw_W.to(w_W.dtype)


def _turned(
    z_NW: torch.Tensor, cos_NH: torch.Tensor, sin_NH: torch.Tensor, back: bool = False
) -> torch.Tensor:
    """`rotate` in two passes, or its transpose, which takes a gradient back."""
    heads = z_NW.unflatten(-1, (-1, cos_NH.shape[-1]))
    out = heads * cos_NH[:, None]
    half = cos_NH.shape[-1] // 2
    first, second, sine = slice(half), slice(half, None), sin_NH[:, None].to(out.dtype)
    for to, other, sign in ((first, second, -1), (second, first, 1)):
        at, value = (other, -sign) if back else (to, sign)
        out[..., to].addcmul_(heads[..., other], sine[..., at], value=value)
    return out.flatten(-2)


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _in_cache(x_NW: torch.Tensor) -> list[slice]:
    return rows_in_cache(len(x_NW), _wide(x_NW).itemsize * x_NW.shape[1])


def _forward_triton(x_NW, w_W, eps, residual_NW, cos_NH, sin_NH):
    x_NW, y_NW = x_NW.contiguous(), torch.empty_like(x_NW, memory_format=torch.contiguous_format)
    rest_NW = x_NW if residual_NW is None else residual_NW.contiguous()
    inverse_N = torch.empty(len(x_NW), dtype=torch.float32, device=x_NW.device)
    if x_NW.numel():
        tensors = (x_NW, w_W, rest_NW, *_tables(x_NW, cos_NH, sin_NH), y_NW, inverse_N)
        flags = _flags(x_NW, cos_NH)
        residual = residual_NW is not None
        _forward[(len(x_NW),)](*tensors, eps, x_NW.shape[1], RESIDUAL=residual, **flags)
    return y_NW, inverse_N


def _backward_triton(dy_NW, x_NW, w_W, inverse_N, cos_NH, sin_NH, learns):
    dy_NW, x_NW, dx_NW = dy_NW.contiguous(), x_NW.contiguous(), torch.empty_like(x_NW)
    programs = min(PROGRAMS, len(x_NW))
    parts = dx_NW
    if learns:
        parts = torch.zeros(max(1, programs), len(w_W), device=x_NW.device)
    if x_NW.numel():
        tensors = (dy_NW, x_NW, w_W, inverse_N, *_tables(x_NW, cos_NH, sin_NH), dx_NW, parts)
        flags = _flags(x_NW, cos_NH)
        _backward[(programs,)](*tensors, *x_NW.shape, programs, LEARNS=learns, **flags)
    return dx_NW, parts.sum(0).to(w_W.dtype) if learns else None


def _flags(x_NW: torch.Tensor, cos_NH: torch.Tensor | None) -> dict[str, int]:
    head = 0 if cos_NH is None else cos_NH.shape[1]
    block = triton.next_power_of_2(max(1, x_NW.shape[1]))
    return {"HEAD": head, "BLOCK": block, "num_warps": _warps(block)}


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


def _tables(x_NW: torch.Tensor, *tables: torch.Tensor | None) -> list[torch.Tensor]:
    """In their place something that can be passed, where there are none."""
    return [x_NW if table is None else table.contiguous() for table in tables]


if triton is not None:

    @triton.jit
    def _forward(
        x_ptr,
        w_ptr,
        rest_ptr,
        cos_ptr,
        sin_ptr,
        y_ptr,
        inverse_ptr,
        eps,
        width,
        RESIDUAL: tl.constexpr,
        HEAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        row = tl.program_id(0).to(tl.int64)
        at = tl.arange(0, BLOCK)
        inside = at < width
        x = tl.load(x_ptr + row * width + at, inside, 0.0).to(tl.float32)
        inverse = 1 / tl.sqrt(tl.sum(x * x) / width + eps)
        tl.store(inverse_ptr + row, inverse)
        y = x * inverse * tl.load(w_ptr + at, inside, 0.0).to(tl.float32)
        if HEAD:
            in_head = at % HEAD
            sign = tl.where(in_head < HEAD // 2, -1.0, 1.0)
            other = tl.where(in_head < HEAD // 2, at + HEAD // 2, at - HEAD // 2)
            x_other = tl.load(x_ptr + row * width + other, inside, 0.0).to(tl.float32)
            z_other = x_other * inverse * tl.load(w_ptr + other, inside, 0.0).to(tl.float32)
            cos = tl.load(cos_ptr + row * HEAD + in_head).to(tl.float32)
            sin = tl.load(sin_ptr + row * HEAD + in_head).to(tl.float32)
            y = y * cos + sign * z_other * sin
        if RESIDUAL:
            y = y.to(y_ptr.dtype.element_ty).to(tl.float32)
            y += tl.load(rest_ptr + row * width + at, inside, 0.0).to(tl.float32)
        tl.store(y_ptr + row * width + at, y.to(y_ptr.dtype.element_ty), inside)

    @triton.jit
    def _backward(
        dy_ptr,
        x_ptr,
        w_ptr,
        inverse_ptr,
        cos_ptr,
        sin_ptr,
        dx_ptr,
        parts_ptr,
        rows,
        width,
        programs,
        LEARNS: tl.constexpr,
        HEAD: tl.constexpr,
        BLOCK: tl.constexpr,
    ):
        at = tl.arange(0, BLOCK)
        inside = at < width
        w = tl.load(w_ptr + at, inside, 0.0).to(tl.float32)
        dw = tl.zeros((BLOCK,), tl.float32)
        if HEAD:
            in_head = at % HEAD
            sign = tl.where(in_head < HEAD // 2, 1.0, -1.0)
            step = tl.where(in_head < HEAD // 2, HEAD // 2, -(HEAD // 2))
        for turn in range(0, tl.cdiv(rows, programs)):
            row = tl.program_id(0).to(tl.int64) + turn * programs
            here = at < tl.where(row < rows, width, 0)
            start = row * width
            dz = tl.load(dy_ptr + start + at, here, 0.0).to(tl.float32)
            if HEAD:
                dy_other = tl.load(dy_ptr + start + at + step, here, 0.0).to(tl.float32)
                cos = tl.load(cos_ptr + row * HEAD + in_head, here, 0.0).to(tl.float32)
                sin_other = tl.load(sin_ptr + row * HEAD + in_head + step, here, 0.0).to(tl.float32)
                dz = dz * cos + sign * dy_other * sin_other
            inverse = tl.load(inverse_ptr + tl.minimum(row, rows - 1))
            n = tl.load(x_ptr + start + at, here, 0.0).to(tl.float32) * inverse
            dn = dz * w
            dx = inverse * (dn - n * (tl.sum(dn * n) / width))
            tl.store(dx_ptr + start + at, dx.to(dx_ptr.dtype.element_ty), here)
            if LEARNS:
                dw += dz * n
        if LEARNS:
            place = tl.program_id(0).to(tl.int64) * width
            tl.store(parts_ptr + place + at, dw, inside)
