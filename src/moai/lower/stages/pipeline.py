"""One step's code as the code of each device along "pp", which has one of the stages or several.

In: placed code with its loops, on the mesh that the devices of a stage have. Out: each device's code, and which devices
have every input and output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moai.graph.placement import Placement
from moai.graph.step_graph import Phase, StepGraph
from moai.lower.program import Instruction
from moai.lower.stages.assign import Assignment, Step, assigned
from moai.lower.stages.late_sums import with_late_sums
from moai.lower.stages.messages import StageCode, exchanged
from moai.lower.stages.parts import in_parts
from moai.lower.stages.units import units_of
from moai.lower.values import Values
from moai.plan.plan import Plan
from moai.plan.schedule import order


@dataclass(frozen=True)
class Pipeline:
    """`code`: of each device along "pp". `inputs`, `outputs`: the devices that have each of the graph's. `layers`: how
    many of them each stage has, where the cuts are between layers."""

    code: list[list[Instruction]]
    inputs: list[tuple[int, ...]]
    outputs: list[tuple[int, ...]]
    layers: tuple[int, ...] | None


def in_stages(
    graph: StepGraph,
    plan: Plan,
    given: Sequence[Placement | None],
    code: Sequence[Instruction],
    outputs: Sequence[int],
    phases: Mapping[int, Phase],
    values: Values,
) -> Pipeline:
    """Raises NoCut. `outputs`: the values that become the graph's outputs. `phases`: of values."""
    living = {i.id: p.stages for i, p in zip(graph.inputs, given, strict=True) if p is not None and p.stages}
    named = zip(outputs, graph.outputs, strict=True)
    replaced = {id_: graph.inputs[o.replaces].id for id_, o in named if o.replaces is not None}
    code, step, assignment = _assigned(graph, plan, living, replaced, code, phases, values)
    homes = [step.device(home) for home in _homes_of_outputs(graph, outputs, assignment, step.stages)]
    found = exchanged(step, assignment, dict(zip(outputs, homes, strict=True)))
    chunks = step.stages // step.devices
    turns = [any(part >= chunks for own in found for part in own.sections[k]) for k in range(len(found[0].sections))]
    orders = [order(plan.schedule, device, plan.pp, plan.micro, chunks) for device in range(plan.pp)]
    apart = plan.schedule == "zero_bubble"
    return Pipeline(
        [in_parts(own, turns, each, apart, values) for own, each in zip(found, orders, strict=True)],
        [living.get(i.id) or _having(i.id, found, step, assignment) for i in graph.inputs],
        [(home,) for home in homes],
        assignment.dealt,
    )


def _assigned(
    graph: StepGraph,
    plan: Plan,
    living: Mapping[int, tuple[int, ...]],
    replaced: Mapping[int, int],
    code: Sequence[Instruction],
    phases: Mapping[int, Phase],
    values: Values,
) -> tuple[Sequence[Instruction], Step, Assignment]:
    """The stages of `code`, in which gradients of several stages are added up late."""
    data = frozenset(i.id for i in graph.inputs if i.batch)
    passing = frozenset(i.id for i in graph.inputs if not i.batch and i.dies) - frozenset(replaced.values())
    states = frozenset(i.id for i in graph.inputs) - data - passing
    while True:
        units = units_of(code)
        stages = plan.n_stages
        step = Step(code, units, values, phases, data, states, passing, replaced, living, stages, plan.pp, plan.layers)
        assignment = assigned(step)
        late = with_late_sums(code, assignment, values)
        if len(late) == len(code):
            return code, step, assignment
        code = late


def _homes_of_outputs(graph: StepGraph, outputs: Sequence[int], assignment: Assignment, stages: int) -> list[int]:
    """What no stage has for its own is put out where the state lives that it replaces, or else by the last stage."""
    found: dict[int, int] = {}
    for id_, out in zip(outputs, graph.outputs, strict=True):
        replaced = assignment.homes(graph.inputs[out.replaces].id) if out.replaces is not None else set()
        homes = assignment.homes(id_) or replaced or {stages - 1}
        found.setdefault(id_, min(homes))
    return [found[id_] for id_ in outputs]


def _having(id_: int, found: Sequence[StageCode], step: Step, assignment: Assignment) -> tuple[int, ...]:
    """The devices that an input is to be uploaded to."""
    if id_ in assignment.home:
        return (step.device(assignment.home[id_]),)
    return tuple(s for s, stage in enumerate(found) if id_ in stage.reads) or (0,)
