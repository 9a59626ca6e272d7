"""What a device holds in the course of a step, and of what kind it is.

In: a step's program, with what is known of its values. Out: a `Held`.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moai.graph.step_graph import Output, StepGraph, TensorType, flat_ids
from moai.lower.cleanup import uses
from moai.lower.kinds import kinds
from moai.lower.lowering import Lowered
from moai.lower.peak import levels
from moai.lower.pieces import Level
from moai.lower.program import Instruction, Program, Slot
from moai.lower.tasks import bounds
from moai.lower.values import largest_part
from moai.plan.schedule import order
from moai.plan.work import Held


@dataclass(frozen=True)
class Known:
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
    def of(graph: StepGraph, found: Lowered) -> Known:
        return _known(graph, found, found.program, found.phases)

    @staticmethod
    def of_stages(graph: StepGraph, found: Lowered) -> list[Known]:
        """Of each stage."""
        return [_known(graph, found, stage, found.phases) for stage in found.program.stages]


def _known(graph: StepGraph, found: Lowered, program: Program, phases: Mapping[int, str]) -> Known:
    batch = [slot.id for slot, each in zip(found.program.inputs, graph.inputs, strict=True) if each.batch]
    origins = {id(slot): each for slot, each in zip(found.program.outputs, graph.outputs, strict=True)}
    fresh, coming = _fresh_states([(slot, origins[id(slot)]) for slot in program.outputs], phases, program)
    return Known(program, found.types, phases, frozenset(batch), bounds(program, phases), fresh, coming)


def held(known: Known, under_way: int = 1) -> Held:
    """What is held at the most in each stretch of the step, and of what kinds it is. With more layers, what is held at
    such a place grows evenly: in the middle of a phase, no more is held than at one of its ends. `under_way`:
    micro-batches on a stage, at the most."""
    program = _with_under_way(known.program, under_way)
    found = levels(program, known.types, kinds(program, known.batch, known.begins))
    backward, optimizer = known.begins
    cuts = [0, backward // 2, backward, (backward + optimizer) // 2, optimizer, len(found)]
    rows = []
    for begin, end in itertools.pairwise(cuts):
        moments = [
            level._replace(total=level.total + known.coming[at]) for at in range(begin, end) for level in found[at]
        ]
        rows.append(max(moments, default=Level(0)))
    total, gradients, activations = np.array(rows, dtype=np.float64).T
    parameters, before, states = _stored(known)
    return Held(total, gradients, activations, float(parameters), float(states + known.fresh), float(before))


def _with_under_way(program: Program, n: int) -> Program:
    """The program with so many micro-batches under way where forwards and backwards take turns."""
    turns = order("1f1b", 0, n, program.mesh.steps)
    code = [replace(i, args=(turns,)) if i.op == "repeat" and i.args else i for i in program.instructions]
    return replace(program, instructions=tuple(code))


def _stored(known: Known) -> tuple[int, int, int]:
    """Bytes of parameters, of those that embeddings look up in, and of what only the optimizer reads."""
    code = known.program.instructions[: known.begins[1]]
    early = {i for each in code for i in uses(each)}
    tables = _tables(code)
    kept = {s.id: largest_part(s.type, s.placement) for s in known.program.inputs if s.id not in known.batch}
    parameters = sum(n for id_, n in kept.items() if id_ in early)
    before = sum(n for id_, n in kept.items() if id_ in tables)
    return parameters, before, sum(kept.values()) - parameters


def _fresh_states(
    outputs: Sequence[tuple[Slot, Output]], phases: Mapping[int, str], program: Program
) -> tuple[int, list[int]]:
    """`fresh` and `coming` of `Known`. `outputs`: the program's, with what they are in the graph. A first step makes
    the states that all later ones find, and it is those that have to fit: as if they were there before."""
    made = {slot.id: largest_part(slot.type, slot.placement) for slot, o in outputs if _is_fresh(o, phases)}
    fresh = left = sum(made.values())
    coming = []
    for instruction in program.instructions:
        left -= sum(made.get(out, 0) for out in flat_ids(instruction.outs))
        coming.append(left)
    return fresh, [*coming, left]


def _is_fresh(output: Output, phases: Mapping[int, str]) -> bool:
    return output.replaces is None and phases.get(output.id) == "optimizer"


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
