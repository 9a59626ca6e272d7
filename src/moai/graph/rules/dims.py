"""The vocabulary of the rules: what an operator does with each dim of its tensors, in factors.

A *factor* is a loop of the operator: `mm` has m, k and n. A rule names, for each tensor, the factor that every dim
runs over. Splitting a factor over mesh axes splits each dim that runs over it, and nothing else; that is all a device
needs to know to compute its part alone. Several factors may be split at once, over different axes. A dim without a
factor (None) cannot be split.

In: a `Call`, one operator with its arguments by name and its global types. Out: `Dims`, and from `choose` the splits
that fit how the inputs already lie.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from itertools import pairwise
from typing import Any

import torch

from moai.graph.placement import TIME, Placement, Shard
from moai.graph.step_graph import Node, Ref, TensorType, flat_ids, refs


@dataclass(frozen=True, slots=True)
class Unit:
    """A dim of `size` entries for each step of `factor`: [7, S] flattened to [7*S] runs over 7 in units of S."""

    factor: Hashable
    size: int


@dataclass(frozen=True, slots=True)
class Blocked:
    """A dim of `blocks` equal runs, each of which runs over `factor`: query, key and value side by side."""

    factor: Hashable
    blocks: int


@dataclass(frozen=True, slots=True)
class Nested:
    """A dim that runs over several factors, each of them once for every step of those before it: [3, H, E] flattened.
    `loops` are these with their lengths (a factor of None cannot be split). A dim is split over one loop at a time."""

    loops: tuple[tuple[Hashable | None, int], ...]


DimFactors = tuple[Any, ...]  # an entry a dim: a factor's name (any other hashable), a Unit, Blocked, Nested, or None


@dataclass(frozen=True)
class Dims:
    """What each dim of an operator's tensors runs over.

    `inputs`: one entry for each tensor argument, in order; `outputs`: one for each tensor returned.
    `summed`: factors that the operator sums over; split, they leave terms in outputs that do not run over them.
    `maxed`: factors that it takes the maximum over; split, the maximum over devices is to be taken of such outputs.
    `sizes`: arguments that repeat lengths of dims, with the factor of each entry: they follow the split.
    `starts`: integer arguments that say where along a factor a device's part begins, with the factor.
    """

    inputs: tuple[DimFactors, ...]
    outputs: tuple[DimFactors, ...]
    summed: frozenset[Hashable] = frozenset()
    maxed: frozenset[Hashable] = frozenset()
    sizes: dict[str, DimFactors] = field(default_factory=dict)
    starts: dict[str, Hashable] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """One factor cut over `axes`, outermost first: coordinate c over them takes `sizes[c]` steps. With `blocks` > 1 the
    factor is that many equal runs, each cut so."""

    factor: Hashable
    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    blocks: int = 1

    def shard(self, dim: int, entry: Any) -> Shard | None:
        """How a dim that runs over `entry` lies, or None if the split leaves it whole."""
        for factor, unit, blocks in _parts(entry):
            if factor == self.factor:
                return Shard(dim, self.axes, scaled(self.sizes, unit), self.blocks * blocks)
        return None

    def runs_over(self, dims: DimFactors) -> bool:
        return any(factor == self.factor for entry in dims for factor, _, _ in _parts(entry))


Splits = tuple[Split, ...]


def placement_of(dims: DimFactors, splits: Splits, partial: tuple[str, ...] = ()) -> Placement:
    """How a tensor whose dims run over `dims` lies under `splits`."""
    shards = []
    for d, entry in enumerate(dims):
        if entry is not None:
            shards += [s for split in splits if (s := split.shard(d, entry)) is not None]
    return Placement(tuple(shards), partial)


class Call:
    """One operator of a graph, seen by the rules: arguments by their names in the schema, and types."""

    def __init__(self, node: Node, types: Mapping[int, TensorType]):
        self.op = node.op
        self.node = node
        self._types = types
        self.input_ids = [r.id for r in refs((node.args, node.kwargs))]
        self.inputs = [types[i] for i in self.input_ids]
        self.outputs = [types[i] for i in flat_ids(node.outs)]

    @cached_property
    def args(self) -> dict[str, Any]:
        """Arguments by name, defaults included."""
        names = argument_names(self.op)
        bound = dict(argument_defaults(self.op))
        bound.update(zip(names, self.node.args, strict=False))
        bound.update(self.node.kwargs)
        return bound

    @cached_property
    def input_names(self) -> list[str]:
        """The argument that each tensor of `inputs` was given as."""
        named = [*zip(argument_names(self.op), self.node.args, strict=False), *self.node.kwargs.items()]
        return [name for name, value in named for _ in refs(value)]

    def __getitem__(self, name: str) -> Any:
        return self.args[name]

    def type_of(self, ref: Ref) -> TensorType:
        return self._types[ref.id]

    def dims(self, name: str, rank: int) -> tuple[int, ...]:
        """The argument `name` as non-negative dims of a tensor of `rank` dims; absent or empty means all of them."""
        value = self.args.get(name)
        if value is None or value == () or value == []:
            return tuple(range(rank))
        return tuple(d % max(rank, 1) for d in (value if isinstance(value, (tuple, list)) else (value,)))


Rule = Callable[[Call], "Dims | None"]


@cache
def argument_names(op: torch._ops.OpOverload) -> tuple[str, ...]:
    return tuple(a.name for a in op._schema.arguments)


@cache
def argument_defaults(op: torch._ops.OpOverload) -> dict[str, Any]:
    return {a.name: a.default_value if a.has_default_value() else None for a in op._schema.arguments}


@lru_cache(maxsize=4096)
def scaled(sizes: tuple[int, ...], by: int) -> tuple[int, ...]:
    return sizes if by == 1 else tuple(s * by for s in sizes)


@lru_cache(maxsize=4096)
def steps(sizes: tuple[int, ...], unit: int) -> tuple[int, ...] | None:
    """`sizes` in units of `unit`, or None where a device would get a fraction of a step, or none at all."""
    if any(s == 0 or s % unit for s in sizes):
        return None
    return sizes if unit == 1 else tuple(s // unit for s in sizes)


def _parts(entry: Any) -> Sequence[tuple[Hashable, int, int]]:
    """The factors that a dim with this entry runs over, each with its entries a step and its blocks."""
    if entry is None:
        return ()
    kind = type(entry)
    if kind is Unit:
        return ((entry.factor, entry.size, 1),)
    if kind is Blocked:
        return ((entry.factor, 1, entry.blocks),)
    return _parts_of_nested(entry) if kind is Nested else ((entry, 1, 1),)


@lru_cache(maxsize=4096)
def _parts_of_nested(entry: Nested) -> tuple[tuple[Hashable, int, int], ...]:
    lengths = [length for _, length in entry.loops]
    around = [(math.prod(lengths[k + 1 :]), math.prod(lengths[:k])) for k in range(len(lengths))]
    return tuple((f, unit, blocks) for (f, _), (unit, blocks) in zip(entry.loops, around, strict=True) if f is not None)


def factors_of(entry: Any) -> list[Hashable]:
    """The factors that a dim with this entry runs over."""
    return [factor for factor, _, _ in _parts(entry)]


@lru_cache(maxsize=4096)
def common_loops(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The fewest lengths, outermost first, such that neighbours among them multiply to the lengths of `one`, and to
    those of `other`. None where these cross: 2 times 3 entries are not 3 times 2."""
    if math.prod(one) != math.prod(other):
        return None
    cuts = sorted({math.prod(lengths[k:]) for lengths in (one, other) for k in range(len(lengths) + 1)}, reverse=True)
    if any(outer % inner for outer, inner in pairwise(cuts)):
        return None
    return tuple(outer // inner for outer, inner in pairwise(cuts))


def shared_out(loops: Sequence[Any], lengths: Sequence[int], of: Sequence[int]) -> list[list[Any]]:
    """`loops`, which have `lengths`, in runs of neighbours: those of each length in `of`."""
    found: list[list[Any]] = []
    left = iter(zip(loops, lengths, strict=True))
    for whole in of:
        run, n = [], 1
        while n < whole:
            loop, length = next(left)
            run.append(loop)
            n *= length
        found.append(run)
    return found


def split_for(dims: DimFactors, shard: Shard) -> Split | None:
    """The split of a factor that makes a tensor whose dims run over `dims` lie as `shard`, if there is one."""
    for factor, unit, blocks in _parts(dims[shard.dim]):
        sizes = None if shard.blocks % blocks else steps(shard.sizes, unit)
        if sizes is not None:
            return Split(factor, shard.axes, sizes, shard.blocks // blocks)
    return None


def choose(
    dims: Dims, inputs: Sequence[TensorType], outputs: Sequence[TensorType], placements: Sequence[Placement]
) -> Splits:
    """The splits that leave most bytes of the inputs where they are; empty: everything is to be whole.

    `placements`: how the inputs lie now, in order.
    """
    votes: dict[Split, int] = {}
    for factors, type_, placement in zip(dims.inputs, inputs, placements, strict=True):
        for shard in placement.shards:
            split = split_for(factors, shard)
            if split is not None and legal(dims, outputs, split):
                votes[split] = votes.get(split, 0) + type_.nbytes
    if len(votes) < 2:
        return tuple(votes)
    return _compatible(dims, votes)


def _compatible(dims: Dims, votes: dict[Split, int]) -> Splits:
    """The heaviest splits that can go together: a factor is cut once, an axis cuts once, and a dim is."""
    chosen: list[Split] = []
    # A finer cut of the same parts comes first: the coarser one is brought to it for nothing.
    finer = {s: any(_refines(f, s) for f in votes) for s in votes}
    for split in sorted(votes, key=lambda s: (finer[s], -votes[s])):
        apart = all(c.factor != split.factor and not set(c.axes) & set(split.axes) for c in chosen)
        if apart and not meet(dims, (*chosen, split)):
            chosen.append(split)
    return tuple(chosen)


def meet(dims: Dims, splits: Splits) -> bool:
    """Whether several of `splits` would cut one dim."""
    return any(
        type(entry) is Nested and sum(s.runs_over((entry,)) for s in splits) > 1
        for factors in (*dims.inputs, *dims.outputs)
        for entry in factors
    )


def _refines(fine: Split, coarse: Split) -> bool:
    n = len(coarse.axes)
    return fine.factor == coarse.factor and len(fine.axes) > n and fine.axes[:n] == coarse.axes


def legal(dims: Dims, outputs: Sequence[TensorType], split: Split) -> bool:
    """Whether every output either runs over the factor or is an ordinary sum, or a maximum, over it."""
    if split.factor in dims.starts.values() and split.blocks > 1:
        return False
    return all(
        split.runs_over(factors)
        or (split.factor in dims.summed and type_.dtype != torch.bool)
        or (split.factor in dims.maxed and TIME not in split.axes)
        for factors, type_ in zip(dims.outputs, outputs, strict=True)
    )


def left_partial(dims: Dims, factors: DimFactors, splits: Splits) -> tuple[str, ...]:
    """The axes over which an output with `factors` is left in terms (not those it is a maximum over)."""
    return tuple(a for s in splits if not s.runs_over(factors) and s.factor not in dims.maxed for a in s.axes)


def left_maximal(dims: Dims, factors: DimFactors, splits: Splits) -> tuple[str, ...]:
    """The axes over which the maximum of an output with `factors` is to be taken."""
    return tuple(a for s in splits if not s.runs_over(factors) and s.factor in dims.maxed for a in s.axes)
