"""What a device can do. Triton runs on GPUs, and on CPU in its interpreter (TRITON_INTERPRET=1)."""

import torch

try:
    import triton
except ImportError:  # torch alone is enough on CPU
    triton = None


def uses_triton(tensor: torch.Tensor) -> bool:
    return triton is not None and (tensor.is_cuda or triton.knobs.runtime.interpret)


def multiplies_bfloat16() -> bool:
    """Whether torch's fast products on this CPU take bfloat16; else they are ten times as slow."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()
