"""The loops of a program, and what runs outside of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from moai.lower.program import Instruction, Program

COLLECTIVES = ("all_reduce", "all_gather", "reduce_scatter")


def loops(program: Program) -> list[list[Instruction]]:
    """The instructions of each loop, in order."""
    return [s for s, in_loop in _sections(program) if in_loop]


def outside(program: Program) -> list[Instruction]:
    """The instructions that run once."""
    return [i for s, in_loop in _sections(program) if not in_loop for i in s]


def _sections(program: Program) -> list[tuple[list[Instruction], bool]]:
    found: list[tuple[list[Instruction], bool]] = [([], False)]
    for instruction in program.instructions:
        if instruction.op in ("repeat", "end_repeat"):
            found.append(([], instruction.op == "repeat"))
        else:
            found[-1][0].append(instruction)
    return found


def ops(instructions: Iterable[Instruction]) -> Counter[str]:
    """How often each operator is called, by its short name: "mm", "accumulate"."""
    return Counter(short(i) for i in instructions)


def short(instruction: Instruction) -> str:
    return instruction.op.split(".")[1] if "." in instruction.op else instruction.op


def messages(instructions: Iterable[Instruction]) -> list[tuple[str, tuple[str, ...], int]]:
    """Every tensor that devices exchange: the kind of collective, the axes, the tensor's id (joined ones each)."""
    found = []
    for i in instructions:
        kind = i.op.removesuffix("_start")
        if kind in COLLECTIVES:
            terms = i.args[0] if i.op.endswith("_start") else (i.args[0],)
            found += [(kind, i.args[1], t.id) for t in terms]
    return found
