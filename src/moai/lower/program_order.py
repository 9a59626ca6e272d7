"""In which order a device executes a program's instructions.

In: a Program. Out: runs of instructions that follow each other, each with the pass of its loop. Nothing of the runtime
is needed to know that, so whatever looks at programs has it from here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from moai.lower.program import Program


def runs(program: Program) -> Iterator[tuple[range, int | None]]:
    """(positions, pass): a part of a pass, or (None) instructions around loops. The end of a loop comes once, behind
    the last pass: it frees what all of them used."""
    ops = [i.op for i in program.instructions]
    index = 0
    while index < len(ops):
        if ops[index] != "repeat":
            end = ops.index("repeat", index) if "repeat" in ops[index:] else len(ops)
            yield range(index, end), None
            index = end
            continue
        end = ops.index("end_repeat", index)
        begins = [at for at in range(index, end) if ops[at] == "begin_part"] or [index]
        parts = [range(a + 1, b) for a, b in pairwise([*begins, end])]
        for part, step in passes(program, index):
            yield parts[part], step
        index = end


def passes(program: Program, begin: int) -> Sequence[tuple[int, int]]:
    """(part, pass) in the order in which the loop that begins at `begin` runs them."""
    args = program.instructions[begin].args
    return args[0] if args else [(0, step) for step in range(program.mesh.steps)]
