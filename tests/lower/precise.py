"""Graphs in another precision, for tests: checked, and ready to be run or looked at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from moai.graph.step_graph import Node, Scalar, StepGraph, flat_ids, map_args, refs
from moai.lower.canonical import canonical
from moai.lower.precision import in_precision
from tests.capture.inline import evaluate
from tests.lower.step_tracing import trace

aten = torch.ops.aten
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64


def rewritten(graph: StepGraph, precision: str | None) -> StepGraph:
    """`graph` in `precision`, of which every node gives what the types claim."""
    nodes, types, outputs = canonical(graph)
    nodes, found = in_precision(nodes, types, graph.inputs, outputs, precision)
    for id_ in (*(i.id for i in graph.inputs), *outputs):
        assert found[id_] == types[id_]
    outs = tuple(replace(o, id=i) for o, i in zip(graph.outputs, outputs, strict=True))
    made = replace(graph, types=tuple(found), nodes=tuple(nodes), outputs=outs)
    assert_types_hold(made)
    return made


def assert_types_hold(graph: StepGraph) -> None:
    """Every operator, run on meta tensors of the types of its operands, gives the types of its results."""

    def meta(leaf: Any) -> Any:
        if isinstance(leaf, Scalar):
            return 1
        if not hasattr(leaf, "id"):
            return leaf
        return torch.empty(graph.types[leaf.id].shape, dtype=graph.types[leaf.id].dtype, device="meta")

    for node in graph.nodes:
        results = node.op(*map_args(node.args, meta), **map_args(node.kwargs, meta))
        found = list(tensors(results))
        claimed = [graph.types[o] for o in flat_ids(node.outs)]
        assert [(tuple(t.shape), t.dtype) for t in found] == [(t.shape, t.dtype) for t in claimed], node


def tensors(results: Any) -> Iterator[torch.Tensor]:
    if isinstance(results, torch.Tensor):
        yield results
    elif results is not None:
        for result in results:
            yield from tensors(result)


def computed(
    fn: Callable[..., Any], state: list[torch.Tensor], batch: list[torch.Tensor], precision: str = "bf16"
) -> tuple[StepGraph, list[torch.Tensor]]:
    """The graph of `fn(*state, *batch)` in `precision`, and what it gives."""
    graph = rewritten(trace(fn, state, batch), precision)
    return graph, evaluate(graph, [*state, *batch], [])


def nodes_of(graph: StepGraph, *ops: Any) -> list[Node]:
    return [n for n in graph.nodes if n.op in ops]


def dtypes(graph: StepGraph, node: Node) -> tuple[list[torch.dtype], list[torch.dtype]]:
    """Those of the operands of a node, and of its results."""
    return [graph.types[r.id].dtype for r in refs((node.args, node.kwargs))], [
        graph.types[o].dtype for o in flat_ids(node.outs)
    ]


def casts_of(graph: StepGraph, id_: int) -> list[Node]:
    return [n for n in nodes_of(graph, aten._to_copy.default) if n.args[0].id == id_]
