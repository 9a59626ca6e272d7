"""The backward of a stage as two parts: what another stage waits for, and the rest.

In: a pass's backward instructions. Out: those that gradients of inputs are made of, and those that gradients of weights
alone are; and what has to be kept for these.

What both need is done in the first part, and handed on.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.in_flight import Loop
from moai.lower.on_meta import written
from moai.lower.operators import BUILTINS, is_view
from moai.lower.program import Instruction, Program
from moai.plan.schedule import BACKWARD

_PRODUCTS = frozenset({"aten.mm.default", "aten.bmm.default", "aten.mv.default", "aten.addmm.default"})
_PARTS = 2  # of a pass with one backward
# What makes so much less than it reads is done at once: what it reads can go then.
_LESS = 2


def inputs_and_weights(
    backward: Sequence[Instruction], nbytes: Callable[[int], int]
) -> tuple[list[Instruction], list[Instruction]]:
    """`nbytes`: of values, on a device. The first part has all that messages are made of, and what takes no long time
    and lets go of memory."""
    awaited = _awaited(backward)
    made: set[int] = set()  # in the first part
    late: set[int] = set()
    first: list[Instruction] = []
    second: list[Instruction] = []
    for instruction, wait in zip(backward, awaited, strict=True):
        if wait or (late.isdisjoint(uses(instruction)) and _is_better_done(instruction, made, nbytes)):
            first.append(instruction)
            made.update(_made(instruction))
        else:
            second.append(instruction)
            late.update(_made(instruction))
    return first, second


def awaited_by_none(program: Program, nbytes: Callable[[int], int]) -> list[Instruction]:
    """Of the backward of a stage that has one, what would be in the second part."""
    code = program.instructions
    begin = next((at for at, each in enumerate(code) if each.op == "repeat" and each.args), None)
    parts = [] if begin is None else Loop.of(program, begin).parts
    if len(parts) != _PARTS:
        return []
    return inputs_and_weights([code[at] for at in parts[BACKWARD]], nbytes)[1]


def kept_for(late: Sequence[Instruction], program: Program, nbytes: Callable[[int], int]) -> int:
    """The bytes of what `late` reads of its pass: views are made again."""
    begin = max(at for at, each in enumerate(program.instructions) if each.op == "repeat")
    made = {o: each for each in program.instructions[begin:] for o in flat_ids(each.outs)}
    own = {o for each in late if each.op != "take" for o in flat_ids(each.outs)}
    kept = set()
    for id_ in {i for each in late for i in uses(each)} - own:
        while id_ in made and is_view(made[id_].op):
            id_ = uses(made[id_])[0]
        if id_ in made and id_ not in own:
            kept.add(id_)
    return sum(map(nbytes, kept))


def _awaited(backward: Sequence[Instruction]) -> list[bool]:
    """Whether each instruction sends something, or makes what another one needs for that."""
    needed: set[int] = set()
    found = []
    for instruction in reversed(backward):
        wait = instruction.op == "send" or not needed.isdisjoint(_made(instruction))
        if wait:
            needed.update(uses(instruction))
        found.append(wait)
    return found[::-1]


def _made(instruction: Instruction) -> list[int]:
    """What it makes, or makes something else of in place."""
    over = [] if instruction.op in BUILTINS else written(instruction)
    return [*flat_ids(instruction.outs), *over]


def _is_better_done(instruction: Instruction, made: Collection[int], nbytes: Callable[[int], int]) -> bool:
    """Of what nobody waits for, whether it is done with the first part: sums over what that has `made`."""
    if not any(i in made for i in uses(instruction)) or instruction.op in _PRODUCTS or is_view(instruction.op):
        return False
    if instruction.op in BUILTINS:
        return instruction.op in ("accumulate", "collect")
    read, made_here = (sum(map(nbytes, ids)) for ids in (uses(instruction), flat_ids(instruction.outs)))
    return _LESS * made_here <= read
