"""What one collective makes of the shapes that its peers bring.

In: the collective's kind ("all_reduce", "all_gather", "reduce_scatter"), its cut (dim, sizes, blocks; of no matter to
all_reduce), shapes. Out: why the shapes do not fit together; the shape that a device receives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


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


def _short(numbers: Sequence[int]) -> str:
    return str(list(numbers)) if len(numbers) <= 16 else f"[{', '.join(map(str, numbers[:16]))}, ...]"
