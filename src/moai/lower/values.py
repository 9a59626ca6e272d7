"""The values of a program under construction: global types, and how each lies on the devices."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

from moai.graph.placement import Placement, Shard
from moai.graph.step_graph import TensorType
from moai.lower.program import PerRank


class Values:
    """Types and placements by value id. Ids below the graph's number of values are the graph's own."""

    def __init__(self, types: tuple[TensorType, ...]):
        self.types = dict(enumerate(types))
        self._placements: dict[int, Placement] = {}
        self._zeros: set[int] = set()
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

    def placement(self, id_: int) -> Placement:
        return self._placements[id_]

    def mark_zero(self, id_: int) -> None:
        self._zeros.add(id_)

    def is_zero(self, id_: int) -> bool:
        """Whether the value is known to hold nothing but zeros."""
        return id_ in self._zeros

    def local_shape(self, id_: int) -> tuple[Any, ...]:
        """The shape of every device's part; the split dim is PerRank where devices differ."""
        return local_shape(self.types[id_].shape, self._placements[id_])

    def local_bytes(self, id_: int) -> int:
        """The size of the largest device's part."""
        type_ = self.types[id_]
        placement = self._placements[id_]
        if not isinstance(placement, Shard):
            return type_.nbytes
        rest = math.prod(s for d, s in enumerate(type_.shape) if d != placement.dim)
        return rest * max(placement.sizes) * type_.dtype.itemsize


@lru_cache(maxsize=4096)
def per_rank(values: tuple[int, ...]) -> int | PerRank:
    """One number a device; just the number where all agree."""
    return values[0] if len(set(values)) == 1 else PerRank(values)


@lru_cache(maxsize=4096)
def offsets(sizes: tuple[int, ...], ends: bool = False) -> tuple[int, ...]:
    """Where each device's part begins (or ends) when parts of `sizes` follow each other."""
    found, at = [], 0
    for size in sizes:
        found.append(at + size if ends else at)
        at += size
    return tuple(found)


def local_shape(shape: tuple[int, ...], placement: Placement) -> tuple[Any, ...]:
    if not isinstance(placement, Shard):
        return shape
    d = placement.dim
    return (*shape[:d], per_rank(placement.sizes), *shape[d + 1 :])
