"""One spelling for operators that have several: what the rules and the emission need to know of.

In: StepGraph. Out: nodes with the same meaning, without those whose results nobody uses, in which

- a view by sizes is aten.reshape with explicit sizes (a part of a tensor may lie in memory as it likes);
- an expansion has explicit sizes;
- a squeeze names the dims that it takes away (a part of a longer dim may have length 1, too);
- a tensor filled with one number is aten.full, whatever tensor its shape was taken from (that one need not be there);
- copies, and views that change nothing, are gone: a value is its content, and nobody writes to it;
- nothing names a device or a memory layout: a Program runs where its worker is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moai.graph.step_graph import Node, Ref, StepGraph, TensorType, flat_ids, map_args, refs

aten = torch.ops.aten

_RESHAPES = frozenset({aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten._reshape_alias.default})
# The number that each of these fills its result with.
_FILLED: dict[torch._ops.OpOverload, Callable[[Node], Any]] = {
    **dict.fromkeys((aten.zeros.default, aten.new_zeros.default, aten.zeros_like.default), lambda node: 0),
    **dict.fromkeys((aten.ones.default, aten.new_ones.default, aten.ones_like.default), lambda node: 1),
    **dict.fromkeys((aten.full.default, aten.full_like.default, aten.fill.Scalar), lambda node: node.args[1]),
    aten.new_full.default: lambda node: node.args[2],
    aten.scalar_tensor.default: lambda node: node.args[0],
}
_UNFILLED = frozenset({aten.empty.memory_format, aten.new_empty.default, aten.empty_like.default})
# These keep the content of their argument, and its type unless they are told to change it.
_COPIES = frozenset(
    {
        aten.clone.default,
        aten._to_copy.default,
        aten.alias.default,
        aten.detach.default,
        aten.contiguous.default,
        aten.lift_fresh.default,
        aten.lift_fresh_copy.default,
        aten.reshape.default,
        aten.expand.default,
        aten.squeeze.dims,
    }
)
_SQUEEZES = frozenset({aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims})
_PERMUTATIONS = frozenset({aten.t.default, aten.transpose.int, aten.permute.default})
# Their kernels look at the memory: it has to lie densely.
_NEED_DENSE = frozenset({aten.view_as_complex.default, aten.view.dtype})
_PLACES = ("device", "layout", "pin_memory", "non_blocking", "memory_format", "implicit")


def canonical(graph: StepGraph) -> tuple[list[Node], list[TensorType], list[int]]:
    """The nodes, the types of all values (there may be more than the graph's), and the ids of the graph's outputs."""
    walk = _Walk(graph)
    outputs = [walk.same.get(o.id, o.id) for o in graph.outputs]
    return needed(walk.nodes, outputs), walk.types, outputs


def needed(nodes: Sequence[Node], outputs: Sequence[int]) -> list[Node]:
    """`nodes` without those that contribute nothing to `outputs`."""
    read = set(outputs)
    kept = []
    for node in reversed(nodes):
        if not read.isdisjoint(flat_ids(node.outs)):
            read.update(r.id for r in refs((node.args, node.kwargs)))
            kept.append(node)
    return kept[::-1]


class _Walk:
    """One pass over a graph. `same`: values that are the same as an earlier one."""

    def __init__(self, graph: StepGraph):
        self.nodes: list[Node] = []
        self.types = list(graph.types)
        self.same: dict[int, int] = {}
        self._permuted: dict[
            int, tuple[int, tuple[int, ...]]
        ] = {}  # value -> the value it is a permutation of, and how
        for node in graph.nodes:
            self._add(self._spelled(self._renamed(node)))

    def _add(self, node: Node) -> None:
        if node.op in _COPIES and self.types[node.args[0].id] == self.types[node.outs]:
            self.same[node.outs] = node.args[0].id
        elif node.op in _PERMUTATIONS:
            self._permute(node)
        else:
            self.nodes.append(self._made_dense(node) if node.op in _NEED_DENSE else node)

    def _renamed(self, node: Node) -> Node:
        if all(r.id not in self.same for r in refs((node.args, node.kwargs))):
            return node
        args, kwargs = map_args(
            (node.args, node.kwargs),
            lambda leaf: Ref(self.same.get(leaf.id, leaf.id)) if isinstance(leaf, Ref) else leaf,
        )
        return replace(node, args=args, kwargs=kwargs)

    def _spelled(self, node: Node) -> Node:
        if node.op in _RESHAPES or node.op is aten.expand.default:
            op = aten.expand.default if node.op is aten.expand.default else aten.reshape.default
            return replace(node, op=op, args=(node.args[0], self.types[node.outs].shape), kwargs={})
        if node.op in _SQUEEZES:
            shape = self.types[node.args[0].id].shape
            named = node.args[1] if len(node.args) > 1 else range(len(shape))
            named = (named,) if isinstance(named, int) else named
            gone = tuple(d for d, s in enumerate(shape) if s == 1 and (d in named or d - len(shape) in named))
            return replace(node, op=aten.squeeze.dims, args=(node.args[0], gone), kwargs={})
        if node.op in _FILLED or node.op in _UNFILLED:
            type_ = self.types[node.outs]
            kwargs = {"dtype": type_.dtype}
            if node.op in _UNFILLED:
                return replace(node, op=aten.empty.memory_format, args=(type_.shape,), kwargs=kwargs)
            return replace(node, op=aten.full.default, args=(type_.shape, _FILLED[node.op](node)), kwargs=kwargs)
        kwargs = {k: v for k, v in node.kwargs.items() if k not in _PLACES}
        return node if len(kwargs) == len(node.kwargs) else replace(node, kwargs=kwargs)

    def _permute(self, node: Node) -> None:
        """Permutations of permutations become one; those that cancel out vanish."""
        source, order = self._permuted.get(node.args[0].id, (node.args[0].id, None))
        own = _order(node, len(self.types[node.outs].shape))
        total = own if order is None else tuple(order[d] for d in own)
        if total == tuple(range(len(total))):
            self.same[node.outs] = source
            return
        self._permuted[node.outs] = (source, total)
        self.nodes.append(replace(node, op=aten.permute.default, args=(Ref(source), total), kwargs={}))

    def _made_dense(self, node: Node) -> Node:
        self.types.append(self.types[node.args[0].id])
        dense = Ref(len(self.types) - 1)
        kwargs = {"memory_format": torch.contiguous_format}
        self.nodes.append(Node(aten.clone.default, (node.args[0],), kwargs, dense.id, node.origin))
        return replace(node, args=(dense, *node.args[1:]))


def _order(node: Node, rank: int) -> tuple[int, ...]:
    """The dims of the argument in the order in which the permutation `node` puts them."""
    if node.op is aten.permute.default:
        return tuple(d % rank for d in node.args[1])
    order = list(range(rank))
    if rank > 1:
        a, b = (0, 1) if node.op is aten.t.default else (node.args[1] % rank, node.args[2] % rank)
        order[a], order[b] = order[b], order[a]
    return tuple(order)
