"""A node's numbers on one device: arguments that repeat lengths, or say where a part begins, follow the splits.

In: a node of global shapes, its dims, and how its factors are split. Out: the node with such numbers as `PerRank`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moai.graph.rules.dims import DimFactors, Dims, Split, argument_names
from moai.graph.step_graph import Node
from moai.lower.program import PerRank
from moai.lower.values import length_of, offsets, per_rank


def localised(node: Node, dims: Dims, splits: Sequence[Split]) -> Node:
    if not dims.sizes and not dims.starts:
        return node
    args = list(node.args)
    kwargs = dict(node.kwargs)
    names = argument_names(node.op)

    def change(name: str, new: Any) -> None:
        if name in kwargs:
            kwargs[name] = new(kwargs[name])
        else:
            args[names.index(name)] = new(args[names.index(name)])

    for name, entries in dims.sizes.items():
        change(name, lambda value, entries=entries: _lengths(value, entries, splits))
    for name, factor in dims.starts.items():
        for split in splits:
            if factor == split.factor:
                change(name, lambda start, split=split: _begin(start, split))
    return Node(node.op, tuple(args), kwargs, node.outs, node.origin)


def _lengths(value: Any, entries: DimFactors, splits: Sequence[Split]) -> Any:
    if not isinstance(value, (tuple, list)):
        return _length(value, entries[0], splits)
    padded = (*entries, *[None] * len(value))
    return tuple(_length(v, e, splits) for v, e in zip(value, padded, strict=False))


def _length(value: Any, entry: Any, splits: Sequence[Split]) -> int | PerRank:
    for split in splits:
        shard = split.shard(0, entry)
        if shard is not None:
            return length_of(shard)
    return value


def _begin(start: int, split: Split) -> int | PerRank:
    return per_rank(split.axes, tuple(start + o for o in offsets(split.sizes)))
