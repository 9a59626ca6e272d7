"""Placements: how one global tensor lies on a mesh of devices.

A mesh has named axes. One of them, "micro", is executed in time: its coordinate is the pass of a loop and not a device.
Along another, "pp", devices do not do the same: a coordinate there is a stage, and nothing is ever split over stages.

`Shard.sizes` gives the length of every part, so an uneven split is as ordinary as an even one, and local shapes are
arithmetic: nothing has to be divisible. A placement that names neither shards nor partial axes is whole everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

TIME = "micro"
STAGES = "pp"


@dataclass(frozen=True)
class Mesh:
    """Axes with their sizes, outermost first; devices are numbered row by row over all axes but "micro"."""

    axes: tuple[tuple[str, int], ...]

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.axes)

    @cached_property
    def sizes(self) -> dict[str, int]:
        """Size by name."""
        return dict(self.axes)

    @cached_property
    def n_devices(self) -> int:
        """How many devices the mesh has."""
        return math.prod(size for name, size in self.axes if name != TIME)

    @cached_property
    def steps(self) -> int:
        """Passes of the loop over micro-batches."""
        return self.sizes.get(TIME, 1)

    @cached_property
    def n_stages(self) -> int:
        """Stages that devices along "pp" are."""
        return self.sizes.get(STAGES, 1)

    def stage(self, rank: int) -> int:
        """The stage of device `rank`."""
        return self.coordinates(rank).get(STAGES, 0)

    def at_stage(self, rank: int, stage: int) -> int:
        """The device of `stage` that is where device `rank` is on every other axis."""
        return self.rank({**self.coordinates(rank), STAGES: stage})

    def count(self, axes: Sequence[str]) -> int:
        """The number of coordinates over `axes`."""
        return math.prod(self.sizes[a] for a in axes)

    def coordinates(self, rank: int, step: int = 0) -> dict[str, int]:
        """Where device `rank` is on every axis, in pass `step` of the loop."""
        found = {TIME: step}
        for name, size in reversed(self.axes):
            if name != TIME:
                rank, found[name] = divmod(rank, size)
        return found

    def rank(self, at: Mapping[str, int]) -> int:
        """The device at coordinate `at`."""
        return self.index([name for name, _ in self.axes if name != TIME], at)

    def index(self, axes: Sequence[str], at: Mapping[str, int]) -> int:
        """The number of coordinate `at` over `axes`, row by row."""
        number = 0
        for a in axes:
            number = number * self.sizes[a] + at[a]
        return number

    def group(self, axes: Sequence[str], rank: int) -> list[int]:
        """The devices that differ from device `rank` on `axes` alone (itself included), in order of `index`."""
        own = self.coordinates(rank)
        others = [a for a, _ in self.axes if a not in axes and a != TIME]
        found = []
        for r in range(self.n_devices):
            at = self.coordinates(r)
            if all(at[a] == own[a] for a in others):
                found.append((self.index(axes, at), r))
        return [r for _, r in sorted(found)]


@dataclass(frozen=True, slots=True)
class Shard:
    """Dim `dim` is split over `axes`, outermost first: coordinate c over them (`Mesh.index`) holds `sizes[c]` entries,
    after those of the coordinates before it.

    With `blocks` > 1 the dim consists of so many equally long runs (a fused query, key and value, say) each of which is
    split in this way: a device holds its part of every run, joined.
    """

    dim: int
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: int = 1

    def __str__(self) -> str:
        times = f"x{self.blocks}" if self.blocks > 1 else ""
        return f"S{self.dim}{times}({','.join(self.axes)})"


@dataclass(frozen=True, slots=True)
class Placement:
    """`shards`: at most one a dim, in order of dims, no axis in two of them. `partial`: axes, in order of the mesh,
    over which devices hold terms whose sum is the tensor. Over every other axis all hold the same. `stages`: those
    that have the tensor, each all of it; () stands for all."""

    shards: tuple[Shard, ...] = ()
    partial: tuple[str, ...] = ()
    stages: tuple[int, ...] = ()

    def __str__(self) -> str:
        lies = " ".join([*map(str, self.shards), *(f"P({a})" for a in self.partial)]) or "R"
        return f"{lies} on {','.join(map(str, self.stages))}" if self.stages else lies

    def on(self, stage: int) -> bool:
        """Whether the devices of `stage` have the tensor."""
        return not self.stages or stage in self.stages

    @property
    def split_axes(self) -> tuple[str, ...]:
        """Every axis that some dim is split over."""
        return tuple(a for s in self.shards for a in s.axes)

    def shard_of(self, axis: str) -> Shard | None:
        """The shard that `axis` takes part in, if any."""
        return next((s for s in self.shards if axis in s.axes), None)


REPLICATE = Placement()


def split_evenly(length: int, parts: int) -> tuple[int, ...]:
    """`length` in `parts` parts that differ by at most one, the larger ones first."""
    base, extra = divmod(length, parts)
    return tuple(base + (r < extra) for r in range(parts))


def split_nested(length: int, parts: Sequence[int]) -> tuple[int, ...]:
    """`length` split evenly in parts[0] parts, each of these in parts[1], ...: the innermost lengths, in order."""
    lengths: tuple[int, ...] = (length,)
    for n in parts:
        lengths = tuple(part for whole in lengths for part in split_evenly(whole, n))
    return lengths


def local_shape(shape: tuple[int, ...], placement: Placement, mesh: Mesh, at: Mapping[str, int]) -> tuple[int, ...]:
    """The shape, at coordinate `at`, of the part of a tensor of global `shape`."""
    found = list(shape)
    for shard in placement.shards:
        found[shard.dim] = shard.sizes[mesh.index(shard.axes, at)] * shard.blocks
    return tuple(found)
