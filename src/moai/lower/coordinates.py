"""One Program as single devices see it: its numbers there, and what two devices do differently.

In: a Program and coordinates of its mesh (`Mesh.coordinates`; the pass of the loop is one of them). Out: numbers in the
place of `PerRank`; differences, each with the reason why it may be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

from moai.graph.placement import STAGES, TIME, Mesh
from moai.graph.step_graph import map_args
from moai.lower.operators import BUILTINS, operator
from moai.lower.program import Instruction, PerRank, Program

At = Mapping[str, int]

# Arguments that repeat a length of a local tensor, or say where a part of a dim lies.
_LENGTHS = frozenset(
    {"size", "shape", "input_size", "input_sizes", "split_size", "split_sizes", "num_weights", "n_heads", "N", "shapes"}
)
_PLACES = frozenset({"start", "end"})
_ONCE = ("aten.mul.Scalar", "other")


@dataclass(frozen=True, slots=True)
class Difference:
    """Argument `name` of instruction `index`, which is `one` at the one coordinate and `other` at the other."""

    index: int
    instruction: Instruction
    name: str
    one: Any
    other: Any

    def __str__(self) -> str:
        return f"{self.name} of instruction {self.index}, {self.instruction.op}: {self.one} and {self.other}"


def resolved(args: Any, mesh: Mesh, at: At) -> Any:
    """(Nested) args with the numbers that hold at coordinate `at`."""
    return map_args(args, lambda x: x.values[mesh.index(x.axes, at)] if isinstance(x, PerRank) else x)


def per_ranks(args: Any) -> Iterator[PerRank]:
    """Every `PerRank` in (nested) args."""
    if isinstance(args, PerRank):
        yield args
    elif isinstance(args, (tuple, list)):
        for a in args:
            yield from per_ranks(a)
    elif isinstance(args, dict):
        yield from per_ranks(list(args.values()))


def representatives(program: Program) -> list[int]:
    """Few devices that stand for all: the corners of the mesh, and for each length of a tensor one that has it. Of
    stages, those of the first one: the others' have the same lengths."""
    mesh = program.mesh
    ends = [[0] if name == STAGES else sorted({0, size - 1}) for name, size in mesh.axes if name != TIME]
    space = [name for name, _ in mesh.axes if name != TIME]
    chosen = {mesh.index(space, dict(zip(space, corner, strict=True))) for corner in product(*ends)}
    code = [i for p in program.stages or (program,) for i in p.instructions]
    lengths = {n for i in code for n in per_ranks(i.shapes)}
    missing = {(n, value) for n in lengths for value in n.values}
    for rank in [*sorted(chosen), *range(mesh.n_devices // mesh.n_stages)]:
        passes = [mesh.coordinates(rank, step) for step in range(mesh.steps)]
        own = {(n, n.values[mesh.index(n.axes, at)]) for n in lengths for at in passes}
        if not missing.isdisjoint(own):
            chosen.add(rank)
            missing -= own
        if not missing:
            break
    return sorted(chosen)


def diff(program: Program, one: At, other: At) -> list[Difference]:
    """Every argument that is not the same at two coordinates."""
    found = []
    for index, instruction in enumerate(program.instructions):
        for name, value in _named(instruction):
            a, b = (resolved(value, program.mesh, at) for at in (one, other))
            if a != b:
                found.append(Difference(index, instruction, name, a, b))
    return found


def explanation(difference: Difference) -> str | None:
    """Why devices differ there; None where nothing explains it, which is a bug.

    What is left to lengths is held against the shapes that are claimed by `validate`, which runs the operators.
    """
    one, other = difference.one, difference.other
    if difference.name in _LENGTHS:
        return "a length of a part"
    if difference.name in _PLACES and isinstance(one, int) and isinstance(other, int):
        return "the place of a part"
    if (difference.instruction.op, difference.name) == _ONCE and {one, other} == {0, 1}:
        return "a term that one device alone adds"
    return None


def _named(instruction: Instruction) -> Iterator[tuple[str, Any]]:
    """Arguments with the names that the operator gives them."""
    if instruction.op in BUILTINS:
        names = ["shapes", "dtype"] if instruction.op == "bucket" else []
    else:
        names = [a.name for a in operator(instruction.op)._schema.arguments]
    for k, value in enumerate(instruction.args):
        yield names[k] if k < len(names) else f"argument {k}", value
    yield from instruction.kwargs.items()
