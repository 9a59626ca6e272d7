"""The vocabulary of the rules: what an operator does with each dim of its tensors, in factors.

A *factor* is a loop of the operator: `mm` has m, k and n. A rule names, for each tensor, the factor that every dim
runs over. Splitting a factor over the devices splits each dim that runs over it, and nothing else; that is all a device
needs to know to compute its part alone. A dim without a factor (None) cannot be split.

In: a `Call`, one operator with its arguments by name and its global types. Out: `Dims`, and from `choose` the factor
that fits how the inputs already lie.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache
from typing import Any

import torch

from moai.graph.placement import Partial, Placement, Replicate, Shard
from moai.graph.step_graph import Node, Ref, TensorType, flat_ids, refs

REPLICATE = Replicate()
PARTIAL = Partial()


@dataclass(frozen=True, slots=True)
class Unit:
    """A dim of `size` entries for each step of `factor`: [7, S] flattened to [7*S] runs over 7 in units of S."""

    factor: Hashable
    size: int


DimFactors = tuple[Any, ...]  # an entry a dim: a factor's name (any hashable), a Unit, or None


@dataclass(frozen=True)
class Dims:
    """What each dim of an operator's tensors runs over.

    `inputs`: one entry for each tensor argument, in order; `outputs`: one for each tensor returned.
    `summed`: factors that the operator sums over; split, they leave a Partial in outputs that do not run over them.
    `sizes`: arguments that repeat lengths of dims, with the factor of each entry: they follow the split.
    `starts`: integer arguments that say where along a factor a device's part begins, with the factor.
    """

    inputs: tuple[DimFactors, ...]
    outputs: tuple[DimFactors, ...]
    summed: frozenset[Hashable] = frozenset()
    sizes: dict[str, DimFactors] = field(default_factory=dict)
    starts: dict[str, Hashable] = field(default_factory=dict)


@dataclass(frozen=True)
class Split:
    """One factor, cut in `sizes[r]` steps for device r."""

    factor: Hashable
    sizes: tuple[int, ...]

    def lengths(self, entry: Any) -> tuple[int, ...] | None:
        """Every device's length of a dim that runs over `entry`, or None if the split leaves it whole."""
        factor, unit = _unit(entry)
        return scaled(self.sizes, unit) if entry is not None and factor == self.factor else None

    def runs_over(self, dims: DimFactors) -> bool:
        return any(self.lengths(entry) is not None for entry in dims)

    def placement(self, dims: DimFactors) -> Placement:
        """How a tensor whose dims run over `dims` lies: Replicate if none of them runs over the factor."""
        for d, entry in enumerate(dims):
            lengths = self.lengths(entry)
            if lengths is not None:
                return Shard(d, lengths)
        return REPLICATE


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


def _unit(entry: Any) -> tuple[Hashable, int]:
    return (entry.factor, entry.size) if isinstance(entry, Unit) else (entry, 1)


def split_for(dims: DimFactors, shard: Shard) -> Split | None:
    """The split of a factor that makes a tensor whose dims run over `dims` lie as `shard`, if there is one."""
    entry = dims[shard.dim]
    if entry is None:
        return None
    factor, unit = _unit(entry)
    sizes = steps(shard.sizes, unit)
    return None if sizes is None else Split(factor, sizes)


def choose(
    dims: Dims, inputs: Sequence[TensorType], outputs: Sequence[TensorType], placements: Sequence[Placement]
) -> Split | None:
    """The split that leaves most bytes of the inputs where they are, or None: everything is to be replicated.

    `placements`: how the inputs lie now, in order; none is Partial.
    """
    votes: dict[Split, int] = {}
    for factors, type_, placement in zip(dims.inputs, inputs, placements, strict=True):
        if isinstance(placement, Shard):
            split = split_for(factors, placement)
            if split is not None and _legal(dims, outputs, split):
                votes[split] = votes.get(split, 0) + type_.nbytes
    return max(votes, key=lambda s: votes[s]) if votes else None


def _legal(dims: Dims, outputs: Sequence[TensorType], split: Split) -> bool:
    """Whether every output either runs over the factor or is an ordinary sum over it."""
    return all(
        split.runs_over(factors) or (split.factor in dims.summed and type_.dtype != torch.bool)
        for factors, type_ in zip(dims.outputs, outputs, strict=True)
    )


def output_placement(factors: DimFactors, split: Split) -> Placement:
    """How an output lies after a split: its part, or its term of the sum."""
    return split.placement(factors) if split.runs_over(factors) else PARTIAL
