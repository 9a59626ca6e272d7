"""What was recorded: a tree of operator calls. A segment of the script is a path from the root.

In: built by `recorder`. Out: read by `functionalize`. Segments that begin alike share their first nodes, so a step
that is seen again is matched against the children of the current node and nothing else.

Arguments are kept as specs. `TensorSpec` and `FloatSpec` stand for what varies between runs; every other constant is
kept as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moai.capture.operators import Operator
from moai.capture.values import Base, Geometry, Record
from moai.graph.step_graph import Origin, TensorType

NOWHERE = Origin("forward")


class TensorSpec:
    """An accelerator tensor: the `sid`-th storage of the segment, seen through `geometry`. `fresh` (the storage's base
    geometry) is set at the first use of a storage that exists since before the segment."""

    __slots__ = ("fresh", "geometry", "sid")

    def __init__(self, sid: int, geometry: Geometry, fresh: Base | None) -> None:
        self.sid = sid
        self.geometry = geometry
        self.fresh = fresh


class FloatSpec:
    """A Python float: an input of the graph if `varies`, else the constant `value`."""

    __slots__ = ("value", "varies")

    def __init__(self, value: float, varies: bool) -> None:
        self.value = value
        self.varies = varies

    def accepts(self, other: float) -> bool:
        return self.varies or other == self.value or (other != other and self.value != self.value)


class FloatsSpec:
    """A list of floats that vary (an optimizer's step sizes, one a parameter)."""

    __slots__ = ("length",)

    def __init__(self, length: int) -> None:
        self.length = length


class Seed(int):
    """The seed of a random operator: new at every run."""


class SeedSpec:
    """Where a `Seed` stands."""

    __slots__ = ()


class OutSpec:
    """A new storage: the `sid`-th of the segment, with a tensor of geometry `base`, which `make` makes."""

    __slots__ = ("base", "make", "sid")

    def __init__(self, sid: int, base: Base, make: Callable[[], tuple[torch.Tensor, Record]]) -> None:
        self.sid = sid
        self.base = base
        self.make = make

    @property
    def type(self) -> TensorType:
        size, _, dtype = self.base
        return TensorType(size, dtype)


class Call:
    """A node of the tree: one operator call after the calls of its ancestors.

    `outs` mirrors the call's new tensors: an OutSpec (`plain`), None, or a (nested) list or tuple of those.
    `saw_backward` and `keeps_graph` tell of the segment up to here: a backward pass ran, and one with retain_graph.
    `kept_unused`: a large result was held by the script at the end of a step, and died unused. `compiled` are the
    graphs of the segments that end here; `needed` is what storages that were read here follow from, by their sid.
    """

    __slots__ = ("args", "children", "compiled", "depth", "keeps_graph", "kept_unused", "kwargs", "needed", "operator",
                 "origin", "outs", "parent", "plain", "saw_backward", "writes")  # fmt: skip

    def __init__(self, parent: Call | None, operator: Operator | None) -> None:
        self.parent = parent
        self.operator = operator
        self.depth: int = 0 if parent is None else parent.depth + 1
        self.args: tuple[Any, ...] = ()
        self.kwargs: dict[str, Any] = {}
        self.outs: Any = None
        self.plain = False
        self.writes = False
        self.origin = NOWHERE
        self.saw_backward = False
        self.keeps_graph = False
        self.children: list[Call] = []
        self.compiled: dict[Any, Any] = {}
        self.needed: dict[int, list[Call] | None] = {}
        self.kept_unused = False

    def path(self) -> list[Call]:
        """The calls of the segment that ends here, first to last."""
        calls: list[Call] = []
        node: Call | None = self
        while node is not None and node.operator is not None:
            calls.append(node)
            node = node.parent
        calls.reverse()
        return calls


def out_specs(outs: Any) -> list[OutSpec]:
    """The OutSpecs in a call's `outs`, flat and in order."""
    if isinstance(outs, OutSpec):
        return [outs]
    if outs is None:
        return []
    return [spec for o in outs for spec in out_specs(o)]


def tensor_specs(call: Call) -> list[TensorSpec]:
    """Every tensor argument of a call."""
    found: list[TensorSpec] = []

    def walk(spec: Any) -> None:
        if isinstance(spec, TensorSpec):
            found.append(spec)
        elif isinstance(spec, tuple):
            for s in spec:
                walk(s)

    walk(call.args)
    walk(tuple(call.kwargs.values()))
    return found


def written_specs(call: Call) -> list[TensorSpec]:
    """The tensor arguments that a call writes."""
    operator = call.operator
    assert operator is not None
    found: list[TensorSpec] = []
    for i, name in zip(operator.mutated, operator.mutated_names, strict=True):
        spec = call.args[i] if i < len(call.args) else call.kwargs.get(name)
        found += [spec] if isinstance(spec, TensorSpec) else [s for s in spec or () if isinstance(s, TensorSpec)]
    return found


def count_numbers(spec: Any) -> int:
    """How many of a run's numbers a spec stands for."""
    if isinstance(spec, FloatSpec):
        return int(spec.varies)
    if isinstance(spec, SeedSpec):
        return 1
    if isinstance(spec, FloatsSpec):
        return spec.length
    if isinstance(spec, tuple):
        return sum(count_numbers(s) for s in spec)
    return 0
