"""Which part of a sum each device wants: gradients are summed straight to the shards of the states they update.

In: canonical nodes, and how the states among the inputs lie. Out: for values, the shards in which the optimizer meets
them. Nothing depends on a wish but where a sum over devices is left.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from moai.graph.placement import Shard
from moai.graph.rules import rule_of
from moai.graph.rules.pointwise import pointwise
from moai.graph.step_graph import Node, TensorType, flat_ids, refs
from moai.lower.lanes import lanes_of

Wishes = dict[int, tuple[Shard, ...]]


def wishes(nodes: Sequence[Node], types: Mapping[int, TensorType], states: Mapping[int, tuple[Shard, ...]]) -> Wishes:
    """`states`: the shards of inputs that are spread. A wish goes with tensors of one shape through operators that work
    entry by entry: forwards from a state to its new content, and backwards from there to the gradient."""
    found: Wishes = dict(states)
    groups = [g for n in nodes if n.origin.phase == "optimizer" for g in _alike(n, types)]
    for ordered in (groups, groups[::-1]):
        for group in ordered:
            wish = next((found[i] for i in group if i in found), None)
            if wish is not None:
                for id_ in group:
                    found.setdefault(id_, wish)
    return _to_the_source(nodes, types, found)


def _alike(node: Node, types: Mapping[int, TensorType]) -> Iterator[list[int]]:
    """Inputs and results of a node that have one shape, and go together."""
    lanes = lanes_of(node)
    if lanes is None and rule_of(node.op) is not pointwise:
        return
    inputs, outputs = [r.id for r in refs((node.args, node.kwargs))], flat_ids(node.outs)
    if lanes is None:
        yield _of_largest_shape([*inputs, *outputs], types)
        return
    for lane in lanes:
        yield _of_largest_shape([*(inputs[p] for p in lane.inputs), *(outputs[p] for p in lane.outputs)], types)


def _of_largest_shape(ids: Sequence[int], types: Mapping[int, TensorType]) -> list[int]:
    if not ids:
        return []
    shape = max((types[i] for i in ids), key=lambda t: t.numel).shape
    return [i for i in ids if types[i].shape == shape]


def _to_the_source(nodes: Sequence[Node], types: Mapping[int, TensorType], found: Wishes) -> Wishes:
    """Gradients are scaled and clipped, and perhaps cast, before the optimizer meets them."""
    for node in reversed(nodes):
        if node.origin.phase != "optimizer":
            for group in _alike(node, types):
                outs = set(flat_ids(node.outs))
                wish = next((found[i] for i in group if i in outs and i in found), None)
                if wish is not None:
                    for id_ in group:
                        found.setdefault(id_, wish)
    return found
