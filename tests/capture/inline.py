"""Runs what capture produces in this process, without plans or workers: the executor of the capture tests."""

from __future__ import annotations

from typing import Any

import torch

from moai.capture.recorder import Segment
from moai.graph.step_graph import Ref, Scalar, StepGraph, map_args


def evaluate(graph: StepGraph, inputs: list[torch.Tensor], scalars: list[float | int]) -> list[torch.Tensor]:
    """The outputs of a graph; every node's results are checked against the types that the graph claims."""
    env = {i.id: t for i, t in zip(graph.inputs, inputs, strict=True)}

    def value(arg: Any) -> Any:
        if isinstance(arg, Ref):
            return env[arg.id]
        return scalars[arg.index] if isinstance(arg, Scalar) else arg

    def store(outs: Any, result: Any) -> None:
        if isinstance(outs, int):
            claimed = graph.types[outs]
            assert (tuple(result.shape), result.dtype) == (claimed.shape, claimed.dtype), (
                node.op,
                claimed,
                result.shape,
            )
            env[outs] = result
        elif outs is not None:
            for o, r in zip(outs, result, strict=True):
                store(o, r)

    with torch.no_grad():
        for node in graph.nodes:
            store(node.outs, node.op(*map_args(node.args, value), **map_args(node.kwargs, value)))
    return [env[o.id].clone() for o in graph.outputs]


class InlineExecutor:
    """`execute` and `fetch` of a Recorder; remembers the graphs it was given."""

    def __init__(self) -> None:
        self.graphs: list[tuple[StepGraph, str]] = []
        self.forgotten = 0

    def execute(self, segment: Segment) -> list[torch.Tensor]:
        for value in segment.inputs:
            value.buffer = value.host if value.buffer is None else value.buffer
        return evaluate(segment.graph, [v.buffer for v in segment.inputs], segment.scalars)

    def forget(self) -> None:
        self.forgotten += 1

    def fetch(self, buffer: torch.Tensor) -> torch.Tensor:
        return buffer

    def new_graph(self, graph: StepGraph, cause: str) -> None:
        self.graphs.append((graph, cause))
