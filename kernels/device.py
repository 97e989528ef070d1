"""Where Triton runs: on GPUs, and on CPU in its interpreter (TRITON_INTERPRET=1)."""

import torch

try:
    import triton
except ImportError:  # torch alone is enough on CPU
    triton = None


def uses_triton(tensor: torch.Tensor) -> bool:
    return triton is not None and (tensor.is_cuda or triton.knobs.runtime.interpret)
