"""A deep step as a shallow one, and the shallow one's program as the deep one's.

In: the graph of a step with many layers. Out: one of the same step with a few; and, of what this is lowered to, what
the deep one would be: layers are put in where the shallow program has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from itertools import repeat
from typing import Any

from moai.graph.placement import Placement
from moai.graph.step_graph import Input, Node, Output, StepGraph, TensorType, flat_ids
from moai.lower.buckets import WHOLE_BYTES
from moai.lower.check import check
from moai.lower.depth.layered import Layered, Layers, Version, Whole, layered
from moai.lower.depth.records import Make, Record
from moai.lower.peak import levels
from moai.lower.program import Instruction, Program, Slot
from moai.lower.values import largest_part
from moai.plan.plan import Plan

# Layers of the shallow step that are sure to be whole, in the order in which depths are tried. The first and the last
# are special, and some in a row tell how they go on. What is gathered ahead of time makes more of them special, and so
# does what is split by more than samples.
_DEPTHS, _SPREAD_DEPTHS = (4, 8), (5, 8)
# So many times deeper the step has to be, to be worth it.
_WORTH_IT = 1.5
# Smaller graphs have no layers to speak of.
_WORTH_LOOKING = 500
# What is joined across layers.
_JOINED = ("bucket", "wait")
# Layers of a program: some go to what comes before and behind.
_LEAST = 3


@dataclass(frozen=True)
class Shallow:
    """`graph` and `given` stand for those of a step that is `deeper` units deeper. `layers`: its inputs in layers."""

    graph: StepGraph
    given: Sequence[Placement | None]
    deeper: int
    layers: Sequence[Layers]


def shallow(graph: StepGraph, given: Sequence[Placement | None], plan: Plan) -> Iterator[Shallow]:
    """The same step with fewer layers, if `graph` has many of them: the fewest first, which may not be clear enough."""
    found = layers_of(Identical(graph), tuple(given)) if len(graph.nodes) >= _WORTH_LOOKING else None
    for depth in _SPREAD_DEPTHS if plan.distribute_param or plan.tp > 1 else _DEPTHS:
        if found is not None and found.units >= _WORTH_IT * depth:
            yield _with_units(graph, given, found, depth)


def with_units(graph: StepGraph, given: Sequence[Placement | None], units: int) -> Shallow | None:
    """The same step with so many units of its layers, if it has as many and more.

    Asked again, it is the same object.
    """
    return _kept_with_units(Identical(graph), tuple(given), units)


@lru_cache(maxsize=4)
def _kept_with_units(identical: Identical, given: tuple[Placement | None, ...], units: int) -> Shallow | None:
    graph = identical.graph
    found = layers_of(identical, given) if len(graph.nodes) >= _WORTH_LOOKING else None
    if found is None or found.units <= units:
        return None
    return _with_units(graph, given, found, units)


def _with_units(graph: StepGraph, given: Sequence[Placement | None], found: Layered, units: int) -> Shallow:
    deeper = found.units - units
    less, inputs = _graph(graph, found, -deeper)
    return Shallow(less, [given[at] for at in inputs], deeper, found.inputs(-deeper))


@dataclass(frozen=True, eq=False)
class Identical:
    """Stands for this very graph: comparing graphs by what is in them would take too long."""

    graph: StepGraph

    def __hash__(self) -> int:
        return id(self.graph)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Identical) and self.graph is other.graph


@lru_cache(maxsize=2)
def layers_of(identical: Identical, given: tuple[Placement | None, ...]) -> Layered | None:
    """The layers of a graph, kept for the next plan that it is lowered with."""
    graph = identical.graph
    kinds: dict[object, int] = {}
    kind = [kinds.setdefault((t.shape, t.dtype), len(kinds)) for t in graph.types]
    whole = Whole(
        [(i.id, (kind[i.id], i.batch, i.dies, p)) for i, p in zip(graph.inputs, given, strict=True)],
        graph.n_scalars,
        _Nodes(graph.nodes, kind),
        [(kind[o.id], o.id, o.replaces) for o in graph.outputs],
        len(graph.types),
    )
    return layered(whole, _DEPTHS[0] + 1)


def deepened(program: Program, types: Mapping[int, TensorType], few: Shallow) -> Deep | None:
    """What the deep step is lowered to; None where it is not clear what that would be.

    `program`, whose values are of `types`, is what the shallow step was lowered to.
    """
    whole = Whole(
        [(s.id, replace(s, id=0)) for s in program.inputs],
        program.n_scalars,
        [_of_instruction(i, types) for i in program.instructions],
        [(replace(s, id=0, replaces=None), s.id, s.replaces) for s in program.outputs],
        len(program.inputs) + sum(len(flat_ids(i.outs)) for i in program.instructions),
    )
    layers = layered(whole, _LEAST, few.layers)
    if layers is None:
        return None
    deep = Deep(program, types, layers, few.deeper)
    return deep if deep.is_sound() else None


class Deep:
    """A program and its layers, of which there are `deeper` more."""

    def __init__(self, program: Program, types: Mapping[int, TensorType], layers: Layered, deeper: int) -> None:
        self._shallow = program
        self._types = types
        self._layers = layers
        self._deeper = deeper
        self._version = self._versioned(deeper)
        self._next = self._versioned(1)

    @cached_property
    def program(self) -> Program:
        return replace(self._program(self._version), peak_bytes=self._peak())

    def types(self) -> dict[int, TensorType]:
        """Those of the values of `program`."""
        return self._typed(self._version)

    def is_sound(self) -> bool:
        """Whether the program with one layer more can be executed, and no message that is joined across layers becomes
        larger than one would be if all layers were lowered."""
        try:
            check(self._program(self._next))
            _ = self.program
        except (AssertionError, LookupError, ValueError):  # lists of what belongs together have grown apart
            return False
        places, types = self._layers.positions(1), self._next_types
        for i, moved in zip(self._shallow.instructions, places, strict=True):
            if i.op in _JOINED:
                here = sum(self._types[o].nbytes for o in i.outs)
                more = sum(types[o].nbytes for o in self._next.records[moved].outs) - here
                if more > 0 and here + more * self._deeper >= WHOLE_BYTES:
                    return False
        return True

    def _versioned(self, deeper: int) -> Version[Instruction]:
        code = self._shallow.instructions

        def maker(at: int) -> Make[Instruction]:
            op, where = code[at].op, code[at].where
            return lambda *columns: map(Instruction, repeat(op), *columns, repeat(where))

        return self._layers.version(deeper, maker)

    @cached_property
    def _next_types(self) -> dict[int, TensorType]:
        return self._typed(self._next)

    def _typed(self, version: Version[Instruction]) -> dict[int, TensorType]:
        return {new: self._types[old] for new, old in self._layers.like(version).items() if old in self._types}

    def _peak(self) -> int:
        """With every layer, what is held at some place grows by the same amount: how much, one layer more tells. Within
        a run of layers it grows or shrinks evenly, so that the first and the last of them tell about all."""
        known = levels(self._shallow, self._types)
        more = levels(self._program(self._next), self._next_types)
        places = [*self._layers.positions(1), len(more) - 1]
        return max(
            here.total + (there.total - here.total) * self._deeper
            for at, moved in enumerate(places)
            for here, there in zip(known[at], more[moved], strict=True)
        )

    def _program(self, version: Version[Instruction]) -> Program:
        """The program of a version, but for its peak."""
        inputs = [self._shallow.inputs[at] for at in version.inputs]
        outputs = [(self._shallow.outputs[at], id_, k) for at, id_, k in version.outputs]
        return replace(
            self._shallow,
            inputs=tuple([Slot(at, s.type, s.placement, s.donated) for at, s in enumerate(inputs)]),
            outputs=tuple([Slot(id_, s.type, s.placement, s.donated, k) for s, id_, k in outputs]),
            n_scalars=version.n_scalars,
            instructions=tuple(version.records),
            resident_bytes=sum(largest_part(s.type, s.placement) for s in inputs),
        )


def _graph(graph: StepGraph, layers: Layered, deeper: int) -> tuple[StepGraph, list[int]]:
    """The graph of another depth, and the positions of the inputs that its own are like."""

    def maker(at: int) -> Make[Node]:
        op, origin = graph.nodes[at].op, graph.nodes[at].origin
        return lambda args, kwargs, outs, frees, shapes: map(Node, repeat(op), args, kwargs, outs, repeat(origin))

    version = layers.version(deeper, maker)
    like = layers.like(version)
    inputs = [graph.inputs[at] for at in version.inputs]
    less = StepGraph(
        tuple([graph.types[like[n]] for n in range(len(like))]),
        tuple([Input(at, i.batch, i.dies) for at, i in enumerate(inputs)]),
        tuple([Output(id_, k) for _, id_, k in version.outputs]),
        tuple(version.records),
        version.n_scalars,
    )
    return less, version.inputs


class _Nodes(Sequence[Record]):
    """Nodes as records, of which only few are ever looked at twice."""

    def __init__(self, nodes: Sequence[Node], kind: Sequence[int]) -> None:
        """`kind`: of values, by id."""
        self._nodes = nodes
        self._kind = kind

    def __len__(self) -> int:
        return len(self._nodes)

    def __iter__(self) -> Iterator[Any]:
        """Their parts, as plain tuples: a step has tens of thousands."""
        kind = self._kind
        for node in self._nodes:
            outs = node.outs
            kinds = kind[outs] if type(outs) is int else tuple([kind[o] for o in flat_ids(outs)])
            # Operators compare themselves by name, which takes longer.
            yield (id(node.op), node.origin.phase, kinds), node.args, node.kwargs, outs, (), ()

    def __getitem__(self, at: Any) -> Any:
        """A record, or those of a slice."""
        if isinstance(at, slice):
            return list(map(Record._make, _Nodes(self._nodes[at], self._kind)))
        return Record._make(next(iter(_Nodes((self._nodes[at],), self._kind))))


def _of_instruction(i: Instruction, types: Mapping[int, TensorType]) -> Record:
    op = (i.op, *[types.get(o) for o in flat_ids(i.outs)])
    return Record(op, i.args, i.kwargs, i.outs, i.frees, i.shapes)
