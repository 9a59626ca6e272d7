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
from moai.lower.operators import BUILTINS, is_view
from moai.lower.peak import levels
from moai.lower.program import Instruction, Program
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
    return Observation(work, work, held, held, _handed(known), 0, 0)


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
        _handed(here),
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
    parameters, before, states = _stored(known)
    fresh = _fresh_states(known, begin)
    ends = _loop_ends(known.program)
    # In a later pass, all gradients are there.
    rows = [
        (level + (fresh if at < begin else 0), made[ends[at] if later else at])
        for at in places
        for later, level in enumerate(by_place[at])
    ]
    held, gradients = np.array(rows, dtype=np.float64).T
    return Held(held, gradients, parameters, states + fresh, before)


def _loop_ends(program: Program) -> list[int]:
    """For each instruction, and what is behind the last, where the loop that it is in ends; or else itself."""
    found = list(range(len(program.instructions) + 1))
    end = None
    for at in reversed(range(len(program.instructions))):
        op = program.instructions[at].op
        end = at if op == "end_repeat" else None if op == "repeat" else end
        found[at] = at if end is None else end
    return found


def _fresh_states(known: _Known, begin: int) -> int:
    """Bytes of what the optimizer, at instruction `begin`, makes and keeps. A first step makes the states that all
    later ones find, and it is those that have to fit."""
    early = {s.id for s in known.program.inputs}
    early.update(o for each in known.program.instructions[:begin] for o in flat_ids(each.outs))
    made = [s for s in known.program.outputs if s.replaces is None and s.id not in early]
    return sum(largest_part(s.type, s.placement) for s in made)


def _gradients(known: _Known) -> list[int]:
    """Bytes of the gradients that are there when each instruction ends, and behind the last one: of what the optimizer
    reads that was not there before the step, or of the sums that become it, whichever is more. None of it goes before
    the optimizer begins."""
    code = known.program.instructions
    begin = bounds(known.program, known.phases)[1]
    inputs = {s.id for s in known.program.inputs}
    read = {i for each in code[begin:] if each.op not in BUILTINS for i in uses(each)} - inputs
    lengths = shapes_of(known.program)
    found, made, added = [], 0, 0
    for at, instruction in enumerate(code):
        sums = instruction.op == "accumulate"
        if at < begin or instruction.op in BUILTINS:
            new = [o for o in flat_ids(instruction.outs) if (sums or o in read) and o in known.types]
            nbytes = sum(math.prod(lengths[o]) * known.types[o].dtype.itemsize for o in new)
            made, added = made + nbytes * (not sums), added + nbytes * sums
        found.append(max(made, added))
    return [*found, max(made, added)]


def _stored(known: _Known) -> tuple[int, int, int]:
    """Bytes of parameters, of those that embeddings look up in, and of what only the optimizer reads."""
    code = known.program.instructions[: bounds(known.program, known.phases)[1]]
    early = {i for each in code for i in uses(each)}
    tables = _tables(code)
    kept = {s.id: largest_part(s.type, s.placement) for s in known.program.inputs if s.id not in known.batch}
    parameters = sum(n for id_, n in kept.items() if id_ in early)
    before = sum(n for id_, n in kept.items() if id_ in tables)
    return parameters, before, sum(kept.values()) - parameters


def _tables(code: Sequence[Instruction]) -> set[int]:
    """The values that embeddings look up in, and what these were gathered from."""
    sources: dict[int, int] = {}
    handles: dict[int, Sequence[int]] = {}
    found = set()
    for each in code:
        if each.op == "all_gather_start":
            handles[each.outs] = uses(each)
        elif each.op == "wait" and each.args[0].id in handles:
            sources.update(zip(flat_ids(each.outs), handles[each.args[0].id], strict=True))
        elif each.op == "all_gather":
            sources[each.outs] = each.args[0].id
        elif each.op.split(".")[1:2] == ["embedding"]:
            found.add(each.args[0].id)
    return found | {sources[i] for i in found if i in sources}


def _handed(known: _Known) -> float:
    """Bytes that a layer gives to the next: the fewest that go on within the forward at any place in its middle."""
    code = known.program.instructions[: bounds(known.program, known.phases)[0]]
    lengths = shapes_of(known.program)
    last = {i: at for at, each in enumerate(code) for i in uses(each)}
    change = [0] * (len(code) + 1)
    for at, each in enumerate(code):
        for out in flat_ids(each.outs):
            if last.get(out, at) > at and out in known.types and not is_view(each.op):
                nbytes = math.prod(lengths[out]) * known.types[out].dtype.itemsize
                change[at] += nbytes
                change[last[out]] -= nbytes
    going = np.cumsum(change)[len(code) // 4 : 3 * len(code) // 4]
    return float(going.min()) if len(going) else 0.0
