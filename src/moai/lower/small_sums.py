"""Small sums over devices are no places where devices wait for each other in mid-step.

In: functional instructions. Out: the same in another order. What a sum needs that follows from the step's inputs at
little cost, such as a count of labels, is worked out at the beginning; what only reports need of a sum, such as a mean
loss, at the end. In between, sums are under way (`buckets`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import BOUNDS, BUILTINS
from moai.lower.program import Instruction
from moai.lower.values import Values

# Entries of what is kept for longer than it would have to be.
_SMALL = 1 << 16


def under_way(code: Sequence[Instruction], states: Iterable[int], values: Values) -> list[Instruction]:
    """`code` as in the module docstring. `states` are the outputs that are no reports: the next step needs them."""
    early = _early(code, values)
    late = _late(code, states, values) - early
    rest = [i for at, i in enumerate(code) if at not in early | late]
    return [*(code[at] for at in sorted(early)), *rest, *(code[at] for at in sorted(late))]


def _early(code: Sequence[Instruction], values: Values) -> set[int]:
    """Positions before all loops of what makes the terms of sums from the step's inputs alone."""
    end = min((at for at, i in enumerate(code) if i.op in BOUNDS), default=len(code))
    made = {o: at for at, i in enumerate(code) for o in flat_ids(i.outs)}
    from_inputs: set[int] = set()
    for at, instruction in enumerate(code[:end]):
        sources = {made[i] for i in uses(instruction) if i in made}
        if sources <= from_inputs and _is_light(instruction, values):
            from_inputs.add(at)
    wanted = [made[i.args[0].id] for i in code if i.op == "all_reduce" and i.args[0].id in made]
    early: set[int] = set()
    while wanted:
        at = wanted.pop()
        if at in from_inputs and at not in early:
            early.add(at)
            wanted += (made[i] for i in uses(code[at]) if i in made)
    return early


def _late(code: Sequence[Instruction], states: Iterable[int], values: Values) -> set[int]:
    """Positions behind all loops of what is made of sums, for reports alone."""
    begin = 1 + max((at for at, i in enumerate(code) if i.op in BOUNDS), default=-1)
    for_reports: list[int] = []
    needed = set(states)
    for at in reversed(range(begin, len(code))):
        if needed.isdisjoint(flat_ids(code[at].outs)) and _is_light(code[at], values):
            for_reports.append(at)
        else:
            needed.update(uses(code[at]))
    sums = {i.outs for i in code if i.op == "all_reduce"}
    late: set[int] = set()
    for at in reversed(for_reports):
        if not sums.isdisjoint(uses(code[at])):
            late.add(at)
            sums.update(flat_ids(code[at].outs))
    return late


def _is_light(instruction: Instruction, values: Values) -> bool:
    """Whether it exchanges nothing, and nothing large is kept by moving it."""
    tensors = (*flat_ids(instruction.outs), *uses(instruction))
    return instruction.op not in BUILTINS and all(values.types[i].numel <= _SMALL for i in tensors)
