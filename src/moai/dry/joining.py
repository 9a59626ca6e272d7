"""One graph of two segments: a script that reads its loss before the optimizer's step has a step in two parts.

In: two segments that follow each other, and which values of the second are the first one's. Out: the graph that they
would be if nothing had been read in between.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace

from moai.graph.step_graph import Input, Node, Output, Ref, Scalar, StepGraph, TensorType, map_args


@dataclass(frozen=True, slots=True)
class Part:
    """A segment. `given` and `made`: what its inputs and outputs are, the same for the same value in two segments."""

    graph: StepGraph
    given: tuple[Hashable, ...]
    made: tuple[Hashable, ...]


def joined(first: Part, then: Part) -> StepGraph:
    """`first` and `then` as one graph."""
    a, b = first.graph, then.graph
    known = {value: input_.id for value, input_ in zip(first.given, a.inputs, strict=True)}
    known.update({value: output.id for value, output in zip(first.made, a.outputs, strict=True)})
    ids = _ids(then, known, len(a.types))
    types = [*a.types, *_new_types(b, ids, len(a.types))]
    inputs, places = _inputs(first, then, known, ids)
    return StepGraph(
        tuple(types),
        tuple(inputs),
        tuple(_outputs(first, then, ids, places)),
        (*a.nodes, *(_renamed(node, ids, a.n_scalars) for node in b.nodes)),
        a.n_scalars + b.n_scalars,
    )


def _ids(then: Part, known: dict[Hashable, int], start: int) -> list[int]:
    """The new id of each value of the second segment."""
    shared = {i.id: known[value] for value, i in zip(then.given, then.graph.inputs, strict=True) if value in known}
    ids = []
    for old in range(len(then.graph.types)):
        ids.append(shared.get(old, start))
        start += old not in shared
    return ids


def _new_types(b: StepGraph, ids: Sequence[int], start: int) -> list[TensorType]:
    return [type_ for type_, new in zip(b.types, ids, strict=True) if new >= start]


def _inputs(
    first: Part, then: Part, known: dict[Hashable, int], ids: Sequence[int]
) -> tuple[list[Input], dict[Hashable, int]]:
    """The inputs, and at which place each value is; what both segments take dies when the second one says so."""
    inputs, places = list(first.graph.inputs), {value: at for at, value in enumerate(first.given)}
    for value, input_ in zip(then.given, then.graph.inputs, strict=True):
        if value in places:
            inputs[places[value]] = replace(inputs[places[value]], dies=input_.dies)
        elif value not in known:
            places[value] = len(inputs)
            inputs.append(replace(input_, id=ids[input_.id]))
    return inputs, places


def _outputs(first: Part, then: Part, ids: Sequence[int], places: dict[Hashable, int]) -> list[Output]:
    """What is there after both: of the first, what the second has not overwritten, nor was the last to use."""
    replaced = dict(zip(first.made, [o.replaces for o in first.graph.outputs], strict=True))
    gone = {value for value, i in zip(then.given, then.graph.inputs, strict=True) if i.dies}
    overwritten = {then.given[o.replaces] for o in then.graph.outputs if o.replaces is not None}
    kept = [o for value, o in zip(first.made, first.graph.outputs, strict=True) if value not in gone | overwritten]
    for output in then.graph.outputs:
        value = None if output.replaces is None else then.given[output.replaces]
        target = replaced[value] if value in replaced else None if value is None else places[value]
        kept.append(Output(ids[output.id], target))
    return kept


def _renamed(node: Node, ids: Sequence[int], scalars: int) -> Node:
    def new(arg: object) -> object:
        if type(arg) is Ref:
            return Ref(ids[arg.id])
        return Scalar(arg.index + scalars) if type(arg) is Scalar else arg

    outs = map_args(node.outs, lambda out: None if out is None else ids[out])
    return replace(node, args=map_args(node.args, new), kwargs=map_args(node.kwargs, new), outs=outs)
