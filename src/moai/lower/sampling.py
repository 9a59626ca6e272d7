"""What a step costs under a plan, read off the program that it is lowered to.

In: the graph of a step and a plan. Out: an `Observation`: the device's work and memory for the step with few layers and
with one more. Of a deep model no more than those few layers are lowered.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moai.graph.placement import Placement
from moai.graph.step_graph import StepGraph, TensorType, flat_ids
from moai.lower.cleanup import uses
from moai.lower.depth.steps import Deep, Shallow, deepened, shallow
from moai.lower.inputs import global_batch
from moai.lower.lowering import Lowered, fitted, lowered
from moai.lower.operators import BUILTINS
from moai.lower.peak import levels
from moai.lower.program import Program
from moai.lower.tasks import bounds, shapes_of, tasks
from moai.lower.values import largest_part
from moai.plan.plan import Plan
from moai.plan.work import Held, Observation, Work


@dataclass(frozen=True)
class _Known:
    """A program, with what is known of its values, and which inputs are data."""

    program: Program
    types: Mapping[int, TensorType]
    phases: Mapping[int, str]
    batch: frozenset[int]


def observe(
    graph: StepGraph, plan: Plan, given: Sequence[Placement | None] | None = None, fused: bool = False
) -> Observation:
    """`given`: as for `lower`; nothing is on the devices, by default. `fused`: whether regions are compiled.

    Raises PlanError and RuntimeError as `lower` does.
    """
    given = [None] * len(graph.inputs) if given is None else given
    plan = fitted(graph, plan, given)
    samples = global_batch(graph, given) / (plan.dp * plan.micro)
    for few in shallow(graph, given, plan):
        less = lowered(few.graph, plan, few.given)
        deep = deepened(less.program, less.types, replace(few, deeper=1))
        if deep is not None:
            return _of_deep(less, deep, few, samples, fused)
    return _of_whole(graph, lowered(graph, plan, given), samples, fused)


def _of_whole(graph: StepGraph, whole: Lowered, samples: float, fused: bool) -> Observation:
    batch = _batch(graph, whole.program)
    known = _Known(whole.program, whole.types, whole.phases, batch)
    work, held = _work(known, samples, fused), _held(known, range(len(whole.program.instructions) + 1))
    return Observation(work, work, held, held, 0, 0)


def _of_deep(less: Lowered, deep: Deep, few: Shallow, samples: float, fused: bool) -> Observation:
    program, like = deep.one_more()
    types = {new: less.types[old] for new, old in like.items() if old in less.types}
    phases, batch = less.phases, _batch(few.graph, less.program)
    here = _Known(less.program, less.types, phases, batch)
    there = _Known(
        program,
        types,
        {new: phases[old] for new, old in like.items() if old in phases},
        frozenset(new for new, old in like.items() if old in batch),
    )
    return Observation(
        _work(here, samples, fused),
        _work(there, samples, fused),
        _held(here, range(len(less.program.instructions) + 1)),
        _held(there, deep.places()),
        min(each.count // each.weight for each in few.layers),
        few.deeper,
    )


def _batch(graph: StepGraph, program: Program) -> frozenset[int]:
    return frozenset(slot.id for slot, input_ in zip(program.inputs, graph.inputs, strict=True) if input_.batch)


def _work(known: _Known, samples: float, fused: bool) -> Work:
    return Work.of(tasks(known.program, known.types, known.phases, fused), samples=samples)


def _held(known: _Known, places: Sequence[int]) -> Held:
    """What is held at each of the `places`, in each pass of a loop, and what of that are gradients."""
    by_place = levels(known.program, known.types)
    made, begin = _gradients(known), bounds(known.program, known.phases)[1]
    parameters, states = _stored(known)
    fresh = _fresh_states(known, begin)
    rows = [(level + (fresh if at < begin else 0), made[at]) for at in places for level in by_place[at]]
    held, gradients = np.array(rows, dtype=np.float64).T
    return Held(held, gradients, parameters, states + fresh)


def _fresh_states(known: _Known, begin: int) -> int:
    """Bytes of what the optimizer, at instruction `begin`, makes and keeps. A first step makes the states that all
    later ones find, and it is those that have to fit."""
    early = {s.id for s in known.program.inputs}
    early.update(o for each in known.program.instructions[:begin] for o in flat_ids(each.outs))
    made = [s for s in known.program.outputs if s.replaces is None and s.id not in early]
    return sum(largest_part(s.type, s.placement) for s in made)


def _gradients(known: _Known) -> list[int]:
    """Bytes of the gradients that are there when each instruction ends, and behind the last one: of what the optimizer
    reads that was not there before the step. None of it goes before the optimizer begins."""
    code = known.program.instructions
    begin = bounds(known.program, known.phases)[1]
    inputs = {s.id for s in known.program.inputs}
    read = {i for each in code[begin:] if each.op not in BUILTINS for i in uses(each)} - inputs
    lengths = shapes_of(known.program)
    found, made = [], 0
    for at, instruction in enumerate(code):
        if at < begin or instruction.op in BUILTINS:
            new = [o for o in flat_ids(instruction.outs) if o in read and o in known.types]
            made += sum(math.prod(lengths[o]) * known.types[o].dtype.itemsize for o in new)
        found.append(made)
    return [*found, made]


def _stored(known: _Known) -> tuple[int, int]:
    """Bytes of parameters, and of what only the optimizer reads."""
    code = known.program.instructions[: bounds(known.program, known.phases)[1]]
    early = {i for each in code for i in uses(each)}
    kept = {s.id: largest_part(s.type, s.placement) for s in known.program.inputs if s.id not in known.batch}
    parameters = sum(n for id_, n in kept.items() if id_ in early)
    return parameters, sum(kept.values()) - parameters
