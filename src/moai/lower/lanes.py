"""Operators on lists of tensors (foreach, fused optimizers): their elements are independent of each other.

In: a node. Out: its lanes, one for each position of its lists; None where it is no such operator.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moai.graph.rules.dims import Dims
from moai.graph.rules.pointwise import broadcast
from moai.graph.step_graph import Node, Ref, TensorType

_LISTED = ("aten::_foreach_", "aten::_fused_adam", "aten::_fused_sgd", "aten::_fused_adagrad")


@dataclass(frozen=True, slots=True)
class Lane:
    """One element of every list: positions among a node's tensors, and among its results."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]

    def dims(self, inputs: Sequence[TensorType], outputs: Sequence[TensorType]) -> Dims | None:
        """Entry by entry over the largest tensor; smaller ones (counts of steps) are broadcast. None: it reduces."""
        main = max(inputs, key=lambda t: t.numel)
        if not any(o.shape == main.shape for o in outputs):
            return None
        return Dims(tuple(broadcast(t, main) for t in inputs), tuple(broadcast(t, main) for t in outputs))


@cache
def _takes_lists(op: torch._ops.OpOverload) -> bool:
    return op.name().startswith(_LISTED)


def lanes_of(node: Node) -> list[Lane] | None:
    if not _takes_lists(node.op):
        return None
    results = _result_lists(node.outs)
    n = max((len(r) for r in results), default=0)
    inputs: list[list[int]] = [[] for _ in range(n)]
    at = 0
    for arg in (*node.args, *node.kwargs.values()):
        if isinstance(arg, Ref):
            at += 1
            continue
        tensors = list(_only_refs(arg))
        if tensors and len(tensors) != n:
            return None
        for k in range(len(tensors)):
            inputs[k].append(at + k)
        at += len(tensors)
    if n == 0 or any(len(r) not in (0, n) for r in results):
        return None
    outputs = [tuple(r[k] for r in results if r) for k in range(n)]
    return [Lane(tuple(i), o) for i, o in zip(inputs, outputs, strict=True)]


def _result_lists(outs: Any) -> list[list[int]]:
    """Positions of the results, by list."""
    if not isinstance(outs, tuple) or not outs:
        return []
    if all(isinstance(o, int) for o in outs):
        return [list(range(len(outs)))]
    found, at = [], 0
    for listed in outs:
        if not isinstance(listed, tuple):
            return []
        found.append(list(range(at, at + len(listed))))
        at += len(listed)
    return found


def _only_refs(arg: Any) -> Iterator[Ref]:
    if isinstance(arg, (tuple, list)):
        yield from (a for a in arg if isinstance(a, Ref))
