"""The mean of equal tensors of several files, in fp32, a cache-sized block at a time.

    mean = sum_i a_i / n                    of 16-bit values
    mean = a_0 + sum_i (a_i - a_0) / n      of fp32

Both keep what all agree on bit for bit: sums of equal 16-bit values are exact in fp32, and of fp32
the differences from the first are. Memory holds a block, never a tensor.
"""

import os
from collections.abc import Sequence
from io import FileIO
from typing import NamedTuple

import torch

BLOCK = 256 * 2**10  # elements
COPY_BYTES = 512 * 2**10


class Region(NamedTuple):
    """Bytes of an open file."""

    descriptor: int
    offset: int
    num_bytes: int


def reference(values: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean in the type of the first, rounded once."""
    first = values[0].float()
    if values[0].dtype.itemsize == 2:
        return (sum(value.float() for value in values) / len(values)).to(values[0].dtype)
    total = sum(value.float() - first for value in values)
    return (first + total / len(values)).to(values[0].dtype)


def mean(regions: Sequence[Region], dtype: torch.dtype, out: FileIO) -> None:
    """Write the mean of tensors of one type and size to an unbuffered file."""
    room, is_half = min(BLOCK, regions[0].num_bytes // dtype.itemsize), dtype.itemsize == 2
    read = torch.empty(room, dtype=dtype)
    first, total, other = torch.empty(3, room)
    for start in range(0, regions[0].num_bytes, BLOCK * dtype.itemsize):
        size = min(BLOCK, (regions[0].num_bytes - start) // dtype.itemsize)
        a_0, delta, a_i = first[:size], total[:size].zero_(), other[:size]
        for i, region in enumerate(regions):
            _read(region, start, as_bytes(read[:size]))
            if i or is_half:
                a_i.copy_(read[:size])
                delta.add_(a_i if is_half else a_i.sub_(a_0))
            else:
                a_0.copy_(read[:size])
        delta.div_(len(regions))
        read[:size].copy_(delta if is_half else a_0.add_(delta))
        write(out, as_bytes(read[:size]))


def copy(region: Region, out: FileIO) -> None:
    """Append the bytes to an unbuffered file.

    Through a buffer that stays in the cache: Linux's `copy_file_range` is no faster on ext4.
    """
    buffer = memoryview(bytearray(min(COPY_BYTES, region.num_bytes)))
    for start in range(0, region.num_bytes, COPY_BYTES):
        part = buffer[: region.num_bytes - start]
        _read(region, start, part)
        write(out, part)


def write(out: FileIO, content: memoryview) -> None:
    """All of it: an unbuffered file takes at most 2 GiB at once."""
    while content:
        content = content[out.write(content) :]


def as_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


def _read(region: Region, start: int, into: memoryview) -> None:
    offset = region.offset + start
    while into:
        done = os.preadv(region.descriptor, [into], offset)
        if not done:
            raise EOFError("the file ends before its tensor does")
        into, offset = into[done:], offset + done
