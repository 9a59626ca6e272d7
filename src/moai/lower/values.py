"""The values of a program under construction: global types, and how each lies on the mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from moai.graph.placement import TIME, Mesh, Placement, Shard
from moai.graph.step_graph import TensorType
from moai.lower.program import PerRank


class Values:
    """Types and placements by value id. Ids below the graph's number of values are the graph's own."""

    def __init__(self, types: Sequence[TensorType], mesh: Mesh):
        self.mesh = mesh
        self.types = dict(enumerate(types))
        self._placements: dict[int, Placement] = {}
        self._zeros: set[int] = set()
        self._split_inside: set[tuple[int, int]] = set()
        self._next = len(types)

    def new(self, type_: TensorType | None = None, placement: Placement | None = None) -> int:
        """A fresh id: for a value of `type_`, or, without it, for what is not a tensor (a handle)."""
        id_ = self._next
        self._next += 1
        if type_ is not None:
            self.types[id_] = type_
        if placement is not None:
            self._placements[id_] = placement
        return id_

    def place(self, id_: int, placement: Placement) -> None:
        self._placements[id_] = placement

    def type(self, id_: int) -> TensorType:
        return self.types[id_]

    def shards(self, id_: int) -> tuple[Shard, ...]:
        """Those of the value's placement; none while it has not been placed."""
        placement = self._placements.get(id_)
        return () if placement is None else placement.shards

    def placement(self, id_: int) -> Placement:
        return self._placements[id_]

    def mark_zero(self, id_: int) -> None:
        self._zeros.add(id_)

    def is_zero(self, id_: int) -> bool:
        """Whether the value is known to hold nothing but zeros."""
        return id_ in self._zeros

    def mark_split_inside(self, id_: int, dim: int) -> None:
        self._split_inside.add((id_, dim))

    def is_split_inside(self, id_: int, dim: int) -> bool:
        """Whether it is an inner loop of the dim that is to be split, where it is made of several."""
        return (id_, dim) in self._split_inside

    def varies(self, id_: int) -> bool:
        """Whether the value is another one in each pass of the loop over micro-batches."""
        placement = self._placements.get(id_)
        return placement is not None and (TIME in placement.partial or TIME in placement.split_axes)

    def local_shape(self, id_: int) -> tuple[Any, ...]:
        """The shape of every device's part; a length is PerRank where devices or passes differ."""
        return local_lengths(self.types[id_].shape, self._placements[id_])

    def local_bytes(self, id_: int) -> int:
        """The size of the largest device's part."""
        return largest_part(self.types[id_], self._placements[id_])


def largest_part(type_: TensorType, placement: Placement) -> int:
    """Bytes of a tensor on the device that holds most of it."""
    shape = list(type_.shape)
    for shard in placement.shards:
        shape[shard.dim] = max(shard.sizes) * shard.blocks
    return math.prod(shape) * type_.dtype.itemsize


@lru_cache(maxsize=4096)
def per_rank(axes: tuple[str, ...], values: tuple[int, ...]) -> int | PerRank:
    """One number for each coordinate over `axes`; just the number where all agree."""
    return values[0] if len(set(values)) == 1 else PerRank(axes, values)


@lru_cache(maxsize=4096)
def offsets(sizes: tuple[int, ...], ends: bool = False) -> tuple[int, ...]:
    """Where each part begins (or ends) when parts of `sizes` follow each other."""
    found, at = [], 0
    for size in sizes:
        found.append(at + size if ends else at)
        at += size
    return tuple(found)


@lru_cache(maxsize=4096)
def within(fine: tuple[int, ...], coarse: tuple[int, ...], ends: bool = False) -> tuple[int, ...]:
    """Where each of the parts of `fine` sizes begins (or ends) inside of the part of `coarse` sizes that it lies in.
    Each coarse part is made of equally many fine ones."""
    each = len(fine) // len(coarse)
    begins = offsets(coarse)
    return tuple(at - begins[k // each] for k, at in enumerate(offsets(fine, ends)))


@lru_cache(maxsize=4096)
def joined(fine: tuple[int, ...], n_coarse: int) -> tuple[int, ...]:
    """The sizes of `n_coarse` parts each of which is made of equally many of the `fine` ones."""
    each = len(fine) // n_coarse
    return tuple(sum(fine[k : k + each]) for k in range(0, len(fine), each))


@lru_cache(maxsize=1 << 14)
def local_lengths(shape: tuple[int, ...], placement: Placement) -> tuple[Any, ...]:
    if not placement.shards:
        return shape
    found: list[Any] = list(shape)
    for shard in placement.shards:
        found[shard.dim] = length_of(shard)
    return tuple(found)


def length_of(shard: Shard) -> int | PerRank:
    """The local length of a split dim."""
    return per_rank(shard.axes, tuple(s * shard.blocks for s in shard.sizes))
