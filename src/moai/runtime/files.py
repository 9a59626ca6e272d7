"""Files that devices write into, each the part of a tensor that it holds.

In: buffers, and where their tensors are to lie in a file. Out: who writes what where, and bytes at their places.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Sequence

import torch

from moai.runtime.buffers import Buffer
from moai.runtime.messages import Region
from moai.runtime.parts import holders, part_at
from moai.runtime.transport import pieces

# A disk that takes this much in the time after which a worker counts as stuck is not stuck.
_PIECE_BYTES = 1 << 20


def regions(buffer: Buffer, id: int, at: int) -> Iterator[tuple[int, Region]]:
    """Every part of a tensor that lies in a file from byte `at` on, row by row, with the device that writes it.
    ValueError if devices hold terms of a sum."""
    if buffer.placement.partial:
        raise ValueError(f"{buffer} is a sum that nobody holds")
    whole = torch.empty(buffer.type.shape, dtype=buffer.type.dtype, device="meta")
    for rank, *_ in holders(buffer.placement, buffer.mesh):
        part = part_at(whole, buffer.placement, buffer.mesh, buffer.mesh.coordinates(rank))
        if part.numel():
            first = at + int(part.storage_offset()) * whole.element_size()
            yield rank, Region(id, first, tuple(part.shape), part.stride())


def runs(shape: Sequence[int], stride: Sequence[int]) -> Iterator[tuple[int, int]]:
    """The entries of a tensor of this geometry, in row-major order, as runs without gaps: (first entry, entries)."""
    length, outer = 1, len(shape)
    while outer and (stride[outer - 1] == length or shape[outer - 1] == 1):
        outer -= 1
        length *= shape[outer]
    for index in itertools.product(*map(range, shape[:outer])):
        yield sum(i * s for i, s in zip(index, stride, strict=False)), length


def write_at(file: int, at: int, x: torch.Tensor) -> None:
    """Writes a whole CPU tensor, row by row, into the open `file` from byte `at` on. OSError."""
    x = x.contiguous()
    for _ in write(file, x, at, x.shape, x.stride()):
        pass


def write(file: int, x: torch.Tensor, at: int, shape: Sequence[int], stride: Sequence[int]) -> Iterator[int]:
    """Writes a CPU tensor into the open `file`: its entries, in row-major order, are those of a tensor of geometry
    `shape` and `stride` whose first entry lies at byte `at`. Yields the bytes written, time and again. OSError."""
    size = x.element_size()
    places = runs(shape, stride)
    start, left = 0, 0
    for piece in pieces(x, _PIECE_BYTES):
        while piece:
            if not left:
                first, length = next(places)
                start, left = at + first * size, length * size
            n = os.pwrite(file, piece[:left], start)
            piece, start, left = piece[n:], start + n, left - n
            yield n
