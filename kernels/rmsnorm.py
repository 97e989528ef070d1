"""RMSNorm over the last dimension, perhaps with what stands beside it in a post-norm block.

    z = w * x / sqrt(mean(x^2) + eps)      y = z, residual + z, or z rotated (RoPE, by halves)

One pass over memory each way, in fp32. The backward pass keeps x and one number per row; dw is
formed only where w learns, from partial sums that do not depend on the order of blocks.

Shapes: N rows, W width, H head size; cos and sin [N, H].
"""

import torch

from kernels.device import triton, uses_triton

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
    if not uses_triton(x):
        return reference(x, w_W, eps, residual, rotary)
    flat = x.reshape(-1, x.shape[-1])
    rest = None if residual is None else residual.reshape(flat.shape)
    tables = [None, None]
    if rotary is not None:
        tables = [each.expand(*x.shape[:-1], -1).flatten(0, -2) for each in rotary]
    return _RmsNorm.apply(flat, w_W, eps, rest, *tables).view(x.shape)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_NW, w_W, eps, residual_NW, cos_NH, sin_NH):
        x_NW, y_NW = (
            x_NW.contiguous(),
            torch.empty_like(x_NW, memory_format=torch.contiguous_format),
        )
        rest_NW = x_NW if residual_NW is None else residual_NW.contiguous()
        inverse_N = torch.empty(len(x_NW), dtype=torch.float32, device=x_NW.device)
        ctx.flags = _flags(x_NW, residual_NW is not None, cos_NH)
        cos, sin = _tables(x_NW, cos_NH, sin_NH)
        if x_NW.numel():
            _forward[(len(x_NW),)](
                x_NW, w_W, rest_NW, cos, sin, y_NW, inverse_N, eps, x_NW.shape[1], **ctx.flags
            )
        ctx.save_for_backward(x_NW, w_W, inverse_N, cos_NH, sin_NH)
        return y_NW

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy_NW):
        x_NW, w_W, inverse_N, cos_NH, sin_NH = ctx.saved_tensors
        dy_NW, dx_NW = dy_NW.contiguous(), torch.empty_like(x_NW)
        learns = ctx.needs_input_grad[1]
        programs = min(PROGRAMS, len(x_NW))
        parts = dx_NW
        if learns:
            parts = torch.zeros(max(1, programs), len(w_W), device=x_NW.device)
        cos, sin = _tables(x_NW, cos_NH, sin_NH)
        flags = {name: value for name, value in ctx.flags.items() if name != "RESIDUAL"}
        if x_NW.numel():
            tensors = (dy_NW, x_NW, w_W, inverse_N, cos, sin, dx_NW, parts)
            _backward[(programs,)](*tensors, *x_NW.shape, programs, LEARNS=learns, **flags)
        dw_W = parts.sum(0).to(w_W.dtype) if learns else None
        beside = dy_NW if ctx.flags["RESIDUAL"] else None
        return dx_NW, dw_W, None, beside, None, None


def _flags(x_NW: torch.Tensor, residual: bool, cos_NH: torch.Tensor | None) -> dict[str, int]:
    head = 0 if cos_NH is None else cos_NH.shape[1]
    block = triton.next_power_of_2(max(1, x_NW.shape[1]))
    return {"RESIDUAL": residual, "HEAD": head, "BLOCK": block, "num_warps": _warps(block)}


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
