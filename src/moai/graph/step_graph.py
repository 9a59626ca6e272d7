"""StepGraph: one segment of a script (a training step, as a rule) as a functional graph of global shapes.

In: built by `capture.functionalize`. Out: read by `plan` and `lower`.

A value is an integer id; `StepGraph.types[id]` is its global type. Nodes are in execution order,
free of mutation and of aliasing: an operator that wrote in place in the script appears here as its functional
variant, and `Output.replaces` says whose storage the result takes over.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from moai.graph.made_quickly import made_quickly

Phase = Literal["forward", "backward", "optimizer"]


@dataclass(frozen=True, slots=True)
class TensorType:
    """Shape and dtype of a tensor; strides are not part of a value's meaning."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        n = 1
        for s in self.shape:
            n *= s
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}[{','.join(map(str, self.shape))}]"


@made_quickly
@dataclass(frozen=True, slots=True)
class Ref:
    """A use of value `id`."""

    id: int

    def __repr__(self) -> str:
        return f"%{self.id}"


@dataclass(frozen=True, slots=True)
class Scalar:
    """A use of the `index`-th Python number that is passed anew at each run (a learning rate, a seed)."""

    index: int

    def __repr__(self) -> str:
        return f"s{self.index}"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from: phase, module path, autograd sequence number, the script's line."""

    phase: Phase
    module: str = ""
    sequence: int = -1
    where: str = ""


@made_quickly
@dataclass(frozen=True, slots=True)
class Node:
    """One functional operator.

    `args` and `kwargs` hold `Ref`, `Scalar`, Python constants, dtypes, and (nested) tuples of them.
    `outs` mirrors what the operator returns: an id for a tensor, None for an absent one, and a tuple of those
    for a tuple or list of tensors.
    """

    op: torch._ops.OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    origin: Origin


@dataclass(frozen=True, slots=True)
class Input:
    """A value that exists before the step.

    `batch`: it was uploaded by the script for this step (data, not state).
    `dies`: nothing refers to its old content after the step: the buffer may be overwritten or freed.
    """

    id: int
    batch: bool
    dies: bool


@dataclass(frozen=True, slots=True)
class Output:
    """A value that must exist after the step; `replaces` is the index of the input whose storage it takes over."""

    id: int
    replaces: int | None = None


@dataclass(frozen=True, slots=True)
class StepGraph:
    """See the module docstring. `n_scalars` numbers are passed at each run."""

    types: tuple[TensorType, ...]
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    nodes: tuple[Node, ...]
    n_scalars: int

    @property
    def trains(self) -> bool:
        """Whether the segment holds an optimizer's step (whose nodes come last)."""
        return bool(self.nodes) and self.nodes[-1].origin.phase == "optimizer"

    def __str__(self) -> str:
        def name(v: int) -> str:
            return f"%{v}:{self.types[v]}"

        lines = ["inputs  " + ", ".join(name(i.id) + (" batch" if i.batch else "") for i in self.inputs)]
        for n in self.nodes:
            kw = "".join(f", {k}={v!r}" for k, v in n.kwargs.items())
            outs = ", ".join(name(v) for v in flat_ids(n.outs))
            lines.append(f"{outs} = {n.op}({', '.join(map(repr, n.args))}{kw})  # {n.origin.phase} {n.origin.where}")
        lines.append(
            "outputs "
            + ", ".join(f"%{o.id}" + (f"->in{o.replaces}" if o.replaces is not None else "") for o in self.outputs)
        )
        return "\n".join(lines)


# The walks below are most of what lowering does. They build lists, since generators in generators take thrice as long,
# and compare types, since arguments are nested in nothing but tuples, lists and dicts themselves.


def flat_ids(outs: Any) -> Sequence[int]:
    """The value ids in `Node.outs`, in order."""
    if isinstance(outs, int):
        return (outs,)
    return () if outs is None else [i for o in outs for i in flat_ids(o)]


def refs(args: Any) -> list[Ref]:
    """Every `Ref` in (nested) args or kwargs, in order."""
    found: list[Ref] = []
    _collect(args if type(args) is tuple else (args,), found)
    return found


def _collect(args: Iterable[Any], found: list[Ref]) -> None:
    for a in args:
        kind = type(a)
        if kind is Ref:
            found.append(a)
        elif kind is tuple or kind is list:
            _collect(a, found)
        elif kind is dict and a:
            _collect(a.values(), found)


def map_args(args: Any, fn: Callable[[Any], Any]) -> Any:
    """`args` with `fn` applied to every leaf; tuples, lists and dicts keep their type."""
    kind = type(args)
    if kind is tuple:
        return tuple([map_args(a, fn) for a in args])
    if kind is list:
        return [map_args(a, fn) for a in args]
    if kind is dict:
        return {k: map_args(v, fn) for k, v in args.items()}
    return fn(args)


def has_backward(graph: StepGraph) -> bool:
    """Whether the segment holds a backward pass."""
    return any(n.origin.phase == "backward" for n in graph.nodes)


def tokens(graph: StepGraph) -> int:
    """Positions in a step's batch: entries of its largest input of integers with a batch and a sequence dim."""
    types = [graph.types[i.id] for i in graph.inputs if i.batch]
    return max((t.numel for t in types if t.dtype == torch.int64 and len(t.shape) == 2), default=0)
