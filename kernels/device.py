"""What a device can do. Triton runs on GPUs, and on CPU in its interpreter (TRITON_INTERPRET=1)."""

import torch

try:
    import triton
except ImportError:  # torch alone is enough on CPU
    triton = None

CACHED_BYTES = 2**20  # of one tensor


def uses_triton(tensor: torch.Tensor) -> bool:
    return triton is not None and (tensor.is_cuda or triton.knobs.runtime.interpret)


def multiplies_bfloat16() -> bool:
    """Whether torch's fast products on this CPU take bfloat16; else they are ten times as slow."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def rows_in_cache(num_rows: int, row_bytes: int) -> list[slice]:
    """Rows at a time on a CPU, so that what one step writes is still cached for the next."""
    step = max(1, CACHED_BYTES // max(1, row_bytes))
    return [slice(at, at + step) for at in range(0, num_rows, step)]
