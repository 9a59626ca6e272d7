"""Of weights that are dropped after the forward, the backward takes its own views.

In: canonical nodes. Out: the same nodes, none of the backward reading what the forward has taken of a weight: a view
holds on to the memory of all of it, and it is to be gathered anew.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch

from moai.graph.step_graph import Input, Node, Ref, TensorType, map_args, refs
from moai.lower.operators import is_view

_CAST = torch.ops.aten._to_copy.default


def with_own_views(
    nodes: Sequence[Node], types: Sequence[TensorType], inputs: Iterable[Input]
) -> tuple[list[Node], list[TensorType]]:
    """The nodes and types. Ids of `types` stay; those of new values come behind them."""
    walk = _Walk(types, inputs)
    for node in nodes:
        walk.add(node)
    return walk.nodes, walk.types


class _Walk:
    """One pass over the nodes."""

    def __init__(self, types: Sequence[TensorType], inputs: Iterable[Input]) -> None:
        self.nodes: list[Node] = []
        self.types = list(types)
        self._weights = {i.id for i in inputs if not i.batch}  # and casts of such
        self._views: dict[int, Node] = {}  # what the forward has taken of them, by value
        self._own: dict[int, int] = {}  # for such values, those that the backward takes

    def add(self, node: Node) -> None:
        phase = node.origin.phase
        read = [r.id for r in refs((node.args, node.kwargs))]
        if phase == "forward" and len(read) == 1 and isinstance(node.outs, int):
            if node.op is _CAST and read[0] in self._weights:
                self._weights.add(node.outs)
            elif (read[0] in self._weights or read[0] in self._views) and is_view(str(node.op)):
                self._views[node.outs] = node
        elif phase == "backward" and not self._views.keys().isdisjoint(read):
            for id_ in read:
                self._take(id_, node)
            node = self._renamed(node)
        self.nodes.append(node)

    def _take(self, id_: int, user: Node) -> None:
        """Have the backward's own of value `id_` there."""
        if id_ not in self._views or id_ in self._own:
            return
        view = self._views[id_]
        for source in refs((view.args, view.kwargs)):
            self._take(source.id, user)
        self.types.append(self.types[id_])
        self._own[id_] = len(self.types) - 1
        origin = replace(view.origin, phase=user.origin.phase)
        self.nodes.append(replace(self._renamed(view), outs=self._own[id_], origin=origin))

    def _renamed(self, node: Node) -> Node:
        def renamed(leaf: Any) -> Any:
            return Ref(self._own.get(leaf.id, leaf.id)) if isinstance(leaf, Ref) else leaf

        return replace(node, args=map_args(node.args, renamed), kwargs=map_args(node.kwargs, renamed))
