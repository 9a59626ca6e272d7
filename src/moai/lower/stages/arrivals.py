"""Which of a stage's messages each receive takes.

In: the programs of all stages, whose sends and receives name the message that they are of. Out: the same, in which each
receive has the number of its message among all that the sender sends to it.

A receiver knows by that in which order messages come, and can let them come early.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace

from moai.graph.placement import TIME
from moai.lower.program import Instruction, PerRank, Program
from moai.lower.program_order import runs


def numbered(stages: Sequence[Program]) -> list[Program]:
    """The programs with send(xs, stage) and receive(stage, nth, shapes, dtype). So far these have the message's name
    as the last argument, and in the place of `nth`."""
    numbers: dict[tuple[int, int], dict[int, int]] = {}  # (receiver, message) -> pass -> number
    for program in stages:
        sent: dict[int, int] = defaultdict(int)
        for instruction, step in _executed(program, "send"):
            _, target, message = instruction.args
            numbers.setdefault((target, message), {})[step] = sent[target]
            sent[target] += 1
    return [
        replace(program, instructions=tuple(_numbered(i, stage, numbers) for i in program.instructions))
        for stage, program in enumerate(stages)
    ]


def ahead(program: Program, stage: int) -> int:
    """How many messages of `stage` are received before they are needed: those of a pass, or one."""
    in_loop, found = False, 0
    for instruction in program.instructions:
        if instruction.op in ("repeat", "end_repeat"):
            in_loop = instruction.op == "repeat"
        found += in_loop and instruction.op == "receive" and instruction.args[0] == stage
    return max(found, 1)


def _executed(program: Program, op: str) -> Iterator[tuple[Instruction, int]]:
    """The instructions that are `op` with their passes, as they are executed."""
    for part, step in runs(program):
        for index in part:
            if program.instructions[index].op == op:
                yield program.instructions[index], step or 0


def _numbered(instruction: Instruction, stage: int, numbers: dict[tuple[int, int], dict[int, int]]) -> Instruction:
    if instruction.op == "send":
        return replace(instruction, args=instruction.args[:2])
    if instruction.op != "receive":
        return instruction
    source, message, *what = instruction.args
    by_pass = numbers[stage, message]
    found = [by_pass[step] for step in range(len(by_pass))]
    nth = found[0] if len(found) == 1 else PerRank((TIME,), tuple(found))
    return replace(instruction, args=(source, nth, *what))
