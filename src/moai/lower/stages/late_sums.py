"""What a state owes to several stages is added up once, behind the loop.

In: code, and the stages of its units. Out: the same code, in which a sum over passes of a sum of two gradients that
are made on different stages is the sum of their sums: one message a step instead of one a pass.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace

from moai.graph.step_graph import Ref, flat_ids
from moai.lower.cleanup import uses
from moai.lower.program import Instruction
from moai.lower.stages.assign import Assignment
from moai.lower.values import Values

_ADD = "aten.add.Tensor"


def with_late_sums(code: Sequence[Instruction], assignment: Assignment, values: Values) -> list[Instruction]:
    """`code` itself, if there are none."""
    readers = Counter(i for instruction in code for i in uses(instruction))
    apart = {}
    for instruction in code:
        if instruction.op == _ADD and not instruction.kwargs and len(instruction.args) == 2:
            terms = uses(instruction)
            alone = len(terms) == 2 and readers[instruction.outs] == 1
            alike = alone and all(_lies(i, values) == _lies(instruction.outs, values) for i in terms)
            homes = [assignment.home.get(i) for i in terms]
            if alike and all(assignment.kinds[i] == "backward" for i in terms) and homes[0] != homes[1]:
                apart[instruction.outs] = instruction
    summed = {i.args[0].id for i in code if i.op == "accumulate" and i.args[0].id in apart}
    if not summed:
        return list(code)
    totals: dict[int, list[Instruction]] = defaultdict(list)  # by the term that they are of
    behind: dict[int, Instruction] = {}
    for instruction in code:
        if instruction.op == "accumulate" and instruction.args[0].id in summed:
            add = apart[instruction.args[0].id]
            own = [values.new(values.types[instruction.outs], values.placement(instruction.outs)) for _ in add.args]
            for total, term in zip(own, add.args, strict=True):
                totals[term.id].append(replace(instruction, args=(term, *instruction.args[1:]), outs=total))
            behind[add.outs] = replace(add, args=tuple(map(Ref, own)), outs=instruction.outs, shapes=instruction.shapes)
    found: list[Instruction] = []
    late: list[Instruction] = []
    for instruction in code:
        if instruction.op == _ADD and instruction.outs in behind:
            late.append(behind[instruction.outs])
        elif instruction.op == "end_repeat":
            found += (instruction, *late)
            late = []
        elif instruction.op != "accumulate" or instruction.args[0].id not in behind:
            found.append(instruction)
            found += (total for o in flat_ids(instruction.outs) for total in totals.get(o, ()))
    return found


def _lies(id_: int, values: Values) -> tuple[object, object]:
    return values.types[id_], values.placement(id_)
