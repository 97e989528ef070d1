"""The mean of bfloat16 rows in one pass, by numba: torch needs one pass for each row and two more.

Where numba cannot be had, or may not keep what it compiles, importing this fails.
"""

import numpy as np
from numba import njit, void
from numba.types import float32, int64, uint16, uint32

IN_CACHE = 2048  # columns at a time: the first cache holds their sum and a row of them

# Without the GIL, and vectorised: `inspect_asm` shows it.
_compiled = {"nogil": True, "error_model": "numpy", "cache": True}


@njit(void(uint16[::1], uint32[::1]), **_compiled)
def _widen(row_B: np.ndarray, bits_B: np.ndarray) -> None:
    for i in range(row_B.size):
        bits_B[i] = np.uint32(row_B[i]) << np.uint32(16)


@njit(void(float32[::1], float32[::1]), **_compiled)
def _add(sum_B: np.ndarray, row_B: np.ndarray) -> None:
    for i in range(sum_B.size):
        sum_B[i] += row_B[i]


@njit(void(float32[::1], uint32[::1], float32, uint16[::1]), **_compiled)
def _round(sum_B: np.ndarray, bits_B: np.ndarray, rows: float, mean_B: np.ndarray) -> None:
    """To the nearest, ties to even; `bits_B` are those of the sum."""
    for i in range(sum_B.size):
        sum_B[i] /= rows
    for i in range(sum_B.size):
        bits = bits_B[i]
        if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):  # no number
            mean_B[i] = np.uint16(0x7FC0)
        else:
            odd = (bits >> np.uint32(16)) & np.uint32(1)
            mean_B[i] = (bits + np.uint32(0x7FFF) + odd) >> np.uint32(16)


@njit(void(uint16[:, ::1], uint16[::1], int64), **_compiled)
def mean(rows_RB: np.ndarray, mean_B: np.ndarray, size: int) -> None:
    """The mean of the first `size` columns, in fp32, rounded once; bfloat16 as their bits."""
    sum_bits, row_bits = np.empty(IN_CACHE, np.uint32), np.empty(IN_CACHE, np.uint32)
    sums, row = sum_bits.view(np.float32), row_bits.view(np.float32)
    for start in range(0, size, IN_CACHE):
        end = min(size, start + IN_CACHE)
        wide = end - start
        _widen(rows_RB[0, start:end], sum_bits[:wide])
        for r in range(1, rows_RB.shape[0]):
            _widen(rows_RB[r, start:end], row_bits[:wide])
            _add(sums[:wide], row[:wide])
        _round(sums[:wide], sum_bits[:wide], np.float32(rows_RB.shape[0]), mean_B[start:end])
