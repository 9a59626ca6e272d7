"""What a step costs under a plan, read off the program that it is lowered to.

In: the graph of a step and a plan. Out: an `Observation`: the device's work and memory for the step with few layers and
with one more. Of a deep model no more than those few layers are lowered.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from moai.graph.placement import Placement
from moai.graph.step_graph import Output, StepGraph, TensorType, flat_ids
from moai.lower.cleanup import uses
from moai.lower.depth.steps import Identical, with_units
from moai.lower.inputs import global_batch
from moai.lower.lowering import Spelled, fitted, lowered, spelled
from moai.lower.operators import BUILTINS, is_view
from moai.lower.peak import levels, peak_bytes
from moai.lower.program import Instruction, Program
from moai.lower.tasks import bounds, shapes_of, tasks, tasks_at
from moai.lower.unhindered import without_collections
from moai.lower.values import largest_part
from moai.plan.plan import Plan, Precision, Recompute
from moai.plan.work import Held, Observation, Task, Work

# Units of depth that are lowered, and one more: the first and the last are special, and so may be the one beside them.
_UNITS = 3


@dataclass(frozen=True)
class _Known:
    """A program, with what is known of its values, and which inputs are data. `begins`: of backward and optimizer.
    `fresh`: bytes of states that this step makes and the next finds; `coming`: what of them is not made yet when each
    instruction ends, and behind the last one."""

    program: Program
    types: Mapping[int, TensorType]
    phases: Mapping[int, str]
    batch: frozenset[int]
    begins: tuple[int, int]
    fresh: int
    coming: Sequence[int]

    @staticmethod
    def of(graph: StepGraph, plan: Plan, given: Sequence[Placement | None]) -> _Known:
        found = lowered(graph, plan, given, _spelled(Identical(graph), plan.precision, plan.recompute))
        batch = [slot.id for slot, each in zip(found.program.inputs, graph.inputs, strict=True) if each.batch]
        program, phases = found.program, found.phases
        fresh, coming = _fresh_states(graph, phases, program)
        return _Known(program, found.types, phases, frozenset(batch), bounds(program, phases), fresh, coming)


@lru_cache(maxsize=6)
def _spelled(identical: Identical, precision: Precision | None, recompute: Recompute) -> Spelled:
    """Kept for the next plan: of two depths, three levels."""
    return spelled(identical.graph, precision, recompute)


@without_collections()
def observe(
    graph: StepGraph, plan: Plan, given: Sequence[Placement | None] | None = None, fused: bool = False
) -> Observation:
    """`given`: as for `lower`; nothing is on the devices, by default. `fused`: whether regions are compiled.

    Raises PlanError and RuntimeError as `lower` does.
    """
    given = [None] * len(graph.inputs) if given is None else given
    plan = fitted(graph, plan, given)
    samples = global_batch(graph, given) / (plan.dp * plan.micro)
    few, more = (with_units(graph, given, units) for units in (_UNITS, _UNITS + 1))
    if few is None or more is None:
        whole = _Known.of(graph, plan, given)
        work, held = _work(whole, samples, fused), _held(whole)
        return Observation(work, work, held, held, _handed(whole), 0, 0)
    here, there = (_Known.of(each.graph, plan, each.given) for each in (few, more))
    less, greater = (_work(known, samples, fused) for known in (here, there))
    return Observation(less, greater, _held(here), _held(there), _handed(here), _UNITS, few.deeper)


@dataclass(frozen=True, slots=True)
class FewLayers:
    """A step with few layers, to be run. `at`: for each instruction, the position in `tasks` of the one that its time
    is a part of, if there is one."""

    program: Program
    tasks: Sequence[Task]
    at: Sequence[int | None]


def few_layers(graph: StepGraph, plan: Plan) -> FewLayers:
    """The program whose costs stand for the step's, or the step's own if it has no layers to spare.

    Raises PlanError and RuntimeError as `lower` does.
    """
    given: list[Placement | None] = [None] * len(graph.inputs)
    plan = fitted(graph, plan, given)
    few = with_units(graph, given, _UNITS)
    known = _Known.of(graph, plan, given) if few is None else _Known.of(few.graph, plan, few.given)
    program = replace(known.program, peak_bytes=peak_bytes(known.program, known.types))
    return FewLayers(program, *tasks_at(program, known.types, known.phases))


def _work(known: _Known, samples: float, fused: bool) -> Work:
    return Work.of(tasks(known.program, known.types, known.phases, fused), samples=samples)


def _held(known: _Known) -> Held:
    """What is held at the most in each stretch of the step, and what of that are gradients. With more layers, what is
    held at such a place grows evenly: in the middle of a phase, no more is held than at one of its ends."""
    by_place = levels(known.program, known.types)
    made, (backward, optimizer) = _gradients(known), known.begins
    parameters, before, states = _stored(known)
    ends = _loop_ends(known.program)
    cuts = [0, backward // 2, backward, (backward + optimizer) // 2, optimizer, len(by_place)]
    rows = []
    for begin, end in itertools.pairwise(cuts):
        held = [
            (level + known.coming[at], at, later)
            for at in range(begin, end)
            for later, level in enumerate(by_place[at])
        ]
        level, at, later = max(held, default=(0, 0, 0))
        # In a later pass, all gradients are there.
        rows.append((level, made[ends[at] if later else at]))
    held_most, gradients = np.array(rows, dtype=np.float64).T
    return Held(held_most, gradients, parameters, states + known.fresh, before)


def _loop_ends(program: Program) -> list[int]:
    """For each instruction, and what is behind the last, where the loop that it is in ends; or else itself."""
    found = list(range(len(program.instructions) + 1))
    end = None
    for at in reversed(range(len(program.instructions))):
        op = program.instructions[at].op
        end = at if op == "end_repeat" else None if op == "repeat" else end
        found[at] = at if end is None else end
    return found


def _fresh_states(graph: StepGraph, phases: Mapping[int, str], program: Program) -> tuple[int, list[int]]:
    """`fresh` and `coming` of `_Known`. A first step makes the states that all later ones find, and it is those that
    have to fit: as if the states were there before they are made."""
    made = {
        s.id: largest_part(s.type, s.placement)
        for s, o in zip(program.outputs, graph.outputs, strict=True)
        if _is_fresh(o, phases)
    }
    fresh = left = sum(made.values())
    coming = []
    for instruction in program.instructions:
        left -= sum(made.get(out, 0) for out in flat_ids(instruction.outs))
        coming.append(left)
    return fresh, [*coming, left]


def _is_fresh(output: Output, phases: Mapping[int, str]) -> bool:
    return output.replaces is None and phases.get(output.id) == "optimizer"


def _gradients(known: _Known) -> list[int]:
    """Bytes of the gradients that are there when each instruction ends, and behind the last one: of what the optimizer
    reads that was not there before the step, or of the sums that become it, whichever is more. None of it goes before
    the optimizer begins."""
    code = known.program.instructions
    begin = known.begins[1]
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
    code = known.program.instructions[: known.begins[1]]
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
    code = known.program.instructions[: known.begins[0]]
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
