"""What one collective makes of the shapes that its peers bring.

In: the collective's kind ("all_reduce", "all_gather", "reduce_scatter"), its cut (dim, sizes, blocks; of no matter to
all_reduce), shapes. Out: why shapes do not fit; the shape that a device receives; the memory that all of it takes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

_HALVES = frozenset({torch.float16, torch.bfloat16})


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes of a collective on tensors joined to one message, as `runtime.collectives` runs it.

    held: from the start to the end of the wait, beside the results. working: while the results are made. early: the
    results lie in the message, and so are there from the start. joined: they lie in one piece of memory.
    """

    held: int
    working: int
    early: bool
    joined: bool


def mismatch(op: str, shapes: Sequence[Sequence[int]], cut: Sequence[Any]) -> str | None:
    """Why the peers' `shapes`, in order of their coordinates, do not fit; None if they do.

    What is summed has one shape. What is gathered, the lengths of the parts; what is scattered, that of all parts.
    """
    for dim, lengths in enumerate(zip(*shapes, strict=True)):
        if op == "all_gather" and dim == cut[0]:
            _, sizes, blocks = cut
            if list(lengths) != [size * blocks for size in sizes]:
                return f"parts of lengths {_short(lengths)} are gathered as {_short(sizes)} x {blocks}"
        elif len(set(lengths)) > 1:
            return f"peers bring lengths {_short(lengths)} in dim {dim}"
        elif op == "reduce_scatter" and dim == cut[0]:
            _, sizes, blocks = cut
            if len(sizes) != len(shapes) or lengths[0] != sum(sizes) * blocks:
                return f"a length of {lengths[0]} is scattered as {_short(sizes)} x {blocks}"
    return None


def received(op: str, shape: Sequence[int], cut: Sequence[Any], coordinate: int) -> list[int]:
    """The shape that the device at `coordinate`, which brings `shape`, is left with."""
    found = list(shape)
    if op != "all_reduce":
        dim, sizes, blocks = cut
        found[dim] = (sum(sizes) if op == "all_gather" else sizes[coordinate]) * blocks
    return found


def footprint(
    op: str, shapes: Sequence[Sequence[int]], dtype: torch.dtype, cuts: Sequence[Sequence[Any]], devices: int, own: int
) -> Footprint:
    """For a device at coordinate `own` that brings tensors of `shapes`."""
    halves, size = dtype in _HALVES, dtype.itemsize
    length = sum(map(math.prod, shapes))
    if op == "all_reduce":
        if not halves or devices <= 2:
            return Footprint(0, 0, True, True)
        stretch = -(-length // devices)
        return Footprint((2 * stretch * devices - length) * size, stretch * (4 + size), True, True)
    if op == "all_gather":
        return _of_gathering(shapes, size, cuts, devices, own)
    mine = sum(math.prod(received(op, s, cut, own)) for s, cut in zip(shapes, cuts, strict=True))
    return Footprint((length + devices * mine) * size, 4 * mine if halves else 0, False, True)


def _of_gathering(
    shapes: Sequence[Sequence[int]], size: int, cuts: Sequence[Sequence[Any]], devices: int, own: int
) -> Footprint:
    wholes = [received("all_gather", s, cut, own) for s, cut in zip(shapes, cuts, strict=True)]
    # Each message is as long as the longest one: parts of every tensor, in proportion to their lengths.
    longest = max(
        sum(math.prod(w) // sum(cut[1]) * cut[1][c] for w, cut in zip(wholes, cuts, strict=True))
        for c in range(devices)
    )
    dim, sizes, blocks = cuts[0]
    if len(shapes) == 1 and len(set(sizes)) == 1 and math.prod(wholes[0][:dim]) * blocks == 1:
        return Footprint(0, 0, True, True)
    return Footprint(devices * longest * size, 0, False, False)


def _short(numbers: Sequence[int]) -> str:
    return str(list(numbers)) if len(numbers) <= 16 else f"[{', '.join(map(str, numbers[:16]))}, ...]"
