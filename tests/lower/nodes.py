"""Runs lists of nodes with plain PyTorch in this process, and counts the bytes that they hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from moai.graph.step_graph import Node, Ref, Scalar, flat_ids, map_args, refs


def interpret(
    nodes: Sequence[Node],
    given: Mapping[int, torch.Tensor],
    outputs: Sequence[int],
    scalars: Sequence[float | int] = (),
) -> tuple[list[torch.Tensor], int]:
    """The outputs, and the most bytes that were held at a time beside `given`, the inputs by value id.

    Every value is let go after its last use; memory is counted once however many values lie in it.
    """
    memory = _Memory(given)
    for node, dying in zip(nodes, _dying(nodes, outputs), strict=True):
        memory.run(node, scalars)
        memory.drop(dying)
    return [memory.values[o] for o in outputs], memory.peak


class _Memory:
    def __init__(self, given: Mapping[int, torch.Tensor]):
        self.values = dict(given)
        self.peak = 0
        self._now = 0
        self._given = {t.untyped_storage()._cdata for t in given.values()}
        self._lying: Counter[int] = Counter()  # values in each storage

    def run(self, node: Node, scalars: Sequence[float | int]) -> None:
        def value(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return self.values[leaf.id]
            return scalars[leaf.index] if isinstance(leaf, Scalar) else leaf

        with torch.no_grad():
            self._store(node.outs, node.op(*map_args(node.args, value), **map_args(node.kwargs, value)))
        self.peak = max(self.peak, self._now)

    def drop(self, ids: Iterable[int]) -> None:
        for id_ in ids:
            storage = self.values.pop(id_).untyped_storage()
            self._lying[storage._cdata] -= 1
            if not self._lying[storage._cdata] and storage._cdata not in self._given:
                self._now -= storage.nbytes()

    def _store(self, outs: Any, result: Any) -> None:
        if isinstance(outs, int):
            self.values[outs] = result
            storage = result.untyped_storage()
            if not self._lying[storage._cdata] and storage._cdata not in self._given:
                self._now += storage.nbytes()
            self._lying[storage._cdata] += 1
        elif outs is not None:
            for o, r in zip(outs, result, strict=True):
                self._store(o, r)


def _dying(nodes: Sequence[Node], outputs: Sequence[int]) -> list[list[int]]:
    """For each node, the values that nobody uses after it (inputs stay: the caller has them)."""
    needed = set(outputs)
    made = {o for n in nodes for o in flat_ids(n.outs)}
    dying = []
    for node in reversed(nodes):
        touched = dict.fromkeys((*(r.id for r in refs((node.args, node.kwargs))), *flat_ids(node.outs)))
        dying.append([i for i in touched if i not in needed and i in made])
        needed.update(touched)
    return dying[::-1]
