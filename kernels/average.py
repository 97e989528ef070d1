"""The mean of equal tensors of several files, in fp32, a cache-sized block at a time.

    mean = sum_i a_i / n                    of 16-bit values
    mean = a_0 + sum_i (a_i - a_0) / n      of fp32

Both keep what all agree on bit for bit: sums of equal 16-bit values are exact in fp32, and of fp32
the differences from the first are. Memory holds a block of each, never a tensor. What is written
says where it goes, so that threads can write one file together.
"""

import contextlib
import ctypes
import errno
import functools
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

BLOCK = 256 * 2**10  # elements
COPY_BYTES = 512 * 2**10


class Region(NamedTuple):
    """Bytes of an open file."""

    descriptor: int
    offset: int
    num_bytes: int


class Part(NamedTuple):
    """Where bytes `start` to `stop` of a tensor go that begins at `offset` of an open file."""

    descriptor: int
    offset: int
    start: int
    stop: int


def reference(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean in the type of the first, rounded once."""
    first = values[0].float()
    if values[0].dtype.itemsize == 2:
        total = functools.reduce(torch.add, (value.float() for value in values))  # from -0.0 too
        return (total / len(values)).to(values[0].dtype)
    total = sum(value.float() - first for value in values)
    return (first + total / len(values)).to(values[0].dtype)


def mean(regions: Sequence[Region], dtype: torch.dtype, part: Part) -> None:
    """Write a part of the mean of tensors of one type and size."""
    step = min(BLOCK * dtype.itemsize, part.stop - part.start)
    rows_NB = torch.empty(len(regions), step // dtype.itemsize, dtype=dtype)
    mean_B = torch.empty(rows_NB.shape[1], dtype=dtype)
    read, written = [as_bytes(row_B) for row_B in rows_NB], as_bytes(mean_B)
    form = _former(rows_NB, mean_B)
    for start in range(part.start, part.stop, step or 1):
        size = min(step, part.stop - start)
        for region, row in zip(regions, read, strict=True):
            _read(region, start, row[:size])
        form(size // dtype.itemsize)
        write(part.descriptor, written[:size], part.offset + start)


def _former(rows_NB: torch.Tensor, mean_B: torch.Tensor) -> Callable[[int], None]:
    """What forms the mean of so many columns."""
    if rows_NB.dtype == torch.bfloat16 and (fused := _fused()):
        bits = rows_NB.view(torch.uint16).numpy(), mean_B.view(torch.uint16).numpy()
        return functools.partial(fused, *bits)

    def plain(size: int) -> None:
        mean_B[:size] = reference([*rows_NB[:, :size]])

    return plain


@functools.cache
def _fused() -> Callable[..., None] | None:
    with contextlib.suppress(ImportError, RuntimeError):  # no numba, or nowhere to keep its code
        from kernels import fused_mean

        return fused_mean.mean
    return None


def copy(region: Region, part: Part) -> None:
    """Write a part of the bytes.

    Through a buffer that stays in the cache: Linux's `copy_file_range` is no faster on ext4.
    """
    buffer = memoryview(bytearray(min(COPY_BYTES, part.stop - part.start)))
    for start in range(part.start, part.stop, COPY_BYTES):
        some = buffer[: part.stop - start]
        _read(region, start, some)
        write(part.descriptor, some, part.offset + start)


def reserve(descriptor: int, num_bytes: int) -> None:
    """Take the room of a file at once, where Linux and the file system can.

    A merge takes a seventh less time than with a file that grows, and a full disk is told before
    anything is read. Python's `posix_fallocate` would write to every block where they cannot.
    """
    allocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if allocate is None or not num_bytes:
        return
    allocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    if allocate(descriptor, 0, 0, num_bytes) and ctypes.get_errno() == errno.ENOSPC:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def write(descriptor: int, content: memoryview, offset: int) -> None:
    """All of it: a call writes at most 2 GiB."""
    while content:
        done = os.pwrite(descriptor, content, offset)
        content, offset = content[done:], offset + done


def as_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _read(region: Region, start: int, into: memoryview) -> None:
    offset = region.offset + start
    while into:
        done = os.preadv(region.descriptor, [into], offset)
        if not done:
            raise EOFError("the file ends before its tensor does")
        into, offset = into[done:], offset + done
