"""Values of a dry run: mostly not known, and 0 for who reads them.

In: a segment's graph, and what is known of its inputs. Out: a `Nowhere` for each output. A segment that is small and
follows from data of the host alone is computed: scripts ask whether a mask is all ones, and their step depends on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from moai.graph.step_graph import Ref, Scalar, StepGraph, flat_ids, map_args

# A segment is computed if it has at most this many operators, and no value of more elements.
_OPERATORS = 256
_ELEMENTS = 1 << 25


@dataclass(frozen=True, slots=True)
class Nowhere:
    """A value on devices that are not there; `host` is what it would be, if that is known."""

    host: torch.Tensor | None = None

    def read(self) -> torch.Tensor:
        """The value, or a 0 to be broadcast."""
        return torch.zeros(()) if self.host is None else self.host


def results(graph: StepGraph, inputs: Sequence[Any], scalars: Sequence[float | int]) -> list[Nowhere]:
    """What the outputs of `graph` are, whose inputs are `inputs`: host tensors, or Nowhere."""
    known = [host for i in inputs if (host := i.host if isinstance(i, Nowhere) else i) is not None]
    small = len(graph.nodes) <= _OPERATORS and all(t.numel <= _ELEMENTS for t in graph.types)
    if not small or len(known) < len(inputs):
        return [Nowhere()] * len(graph.outputs)
    values = _computed(graph, dict(zip([i.id for i in graph.inputs], known, strict=True)), scalars)
    return [Nowhere(values[o.id]) for o in graph.outputs]


def _computed(
    graph: StepGraph, values: dict[int, torch.Tensor], scalars: Sequence[float | int]
) -> dict[int, torch.Tensor]:
    def value(arg: Any) -> Any:
        if type(arg) is Ref:
            return values[arg.id]
        return scalars[arg.index] if type(arg) is Scalar else arg

    with torch.no_grad():
        for node in graph.nodes:
            found = node.op(*map_args(node.args, value), **map_args(node.kwargs, value))
            tensors = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
            values.update(zip(flat_ids(node.outs), tensors, strict=True))
    return values
