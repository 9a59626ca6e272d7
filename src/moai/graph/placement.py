"""Placements: how one global tensor lies on the devices of a one-axis mesh.

`Shard.sizes` gives the length of every device's part along `dim`, so an uneven split is as ordinary as an even
one, and local shapes are arithmetic: nothing has to be divisible.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every device holds the whole tensor."""

    def __str__(self) -> str:
        return "R"


@dataclass(frozen=True, slots=True)
class Shard:
    """Device r holds `sizes[r]` entries along `dim`, after the parts of the devices before it."""

    dim: int
    sizes: tuple[int, ...]

    def __str__(self) -> str:
        return f"S{self.dim}"


@dataclass(frozen=True, slots=True)
class Partial:
    """Every device holds a term; the tensor is their sum."""

    def __str__(self) -> str:
        return "P"


Placement = Replicate | Shard | Partial


def split_evenly(length: int, parts: int) -> tuple[int, ...]:
    """`length` in `parts` parts that differ by at most one, the larger ones first."""
    base, extra = divmod(length, parts)
    return tuple(base + (r < extra) for r in range(parts))


def local_shape(shape: tuple[int, ...], placement: Placement, rank: int) -> tuple[int, ...]:
    """Shape of device `rank`'s part of a tensor of global `shape`."""
    if not isinstance(placement, Shard):
        return shape
    return (*shape[: placement.dim], placement.sizes[rank], *shape[placement.dim + 1 :])
