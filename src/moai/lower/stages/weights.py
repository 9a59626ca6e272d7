"""The backward of a stage as two parts: what another stage waits for, and the rest.

In: a pass's backward instructions. Out: those that gradients of inputs are made of, and those that gradients of weights
alone are.

What both need is done in the first part, and handed on.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import BUILTINS, is_view
from moai.lower.program import Instruction
from moai.lower.values import Values

_PRODUCTS = frozenset({"aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.addmm.default"})
# What makes so much less than it reads is done at once: what it reads can go then.
_LESS = 2


def inputs_and_weights(backward: Sequence[Instruction], values: Values) -> tuple[list[Instruction], list[Instruction]]:
    """The first part has all that messages are made of, and what takes no long time and lets go of memory."""
    awaited = _awaited(backward)
    made: set[int] = set()  # in the first part
    late: set[int] = set()
    first: list[Instruction] = []
    second: list[Instruction] = []
    for instruction, wait in zip(backward, awaited, strict=True):
        if wait or (late.isdisjoint(uses(instruction)) and _is_better_done(instruction, made, values)):
            first.append(instruction)
            made.update(flat_ids(instruction.outs))
        else:
            second.append(instruction)
            late.update(flat_ids(instruction.outs))
    return first, second


def _awaited(backward: Sequence[Instruction]) -> list[bool]:
    """Whether each instruction sends something, or makes what another one needs for that."""
    needed: set[int] = set()
    found = []
    for instruction in reversed(backward):
        wait = instruction.op == "send" or not needed.isdisjoint(flat_ids(instruction.outs))
        if wait:
            needed.update(uses(instruction))
        found.append(wait)
    return found[::-1]


def _is_better_done(instruction: Instruction, made: Collection[int], values: Values) -> bool:
    """Of what nobody waits for, whether it is done with the first part: sums over what that has `made`."""
    if not any(i in made for i in uses(instruction)) or instruction.op in _PRODUCTS or is_view(instruction.op):
        return False
    if instruction.op in BUILTINS:
        return instruction.op in ("accumulate", "collect")
    read = sum(values.local_bytes(i) for i in uses(instruction))
    return _LESS * sum(values.local_bytes(o) for o in flat_ids(instruction.outs)) <= read
