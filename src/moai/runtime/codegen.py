"""Program -> one Python function, a line per instruction; only the loop over micro-batches is no straight line.

In: a program's instructions with every call already bound to a function and to this device's numbers (`Call`).
Out: source text, and the constants that it refers to. An instruction's line is `LINES_BEFORE` + its index + 1, so a
line number, in a traceback or of a running frame, names an instruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moai.graph.step_graph import Ref, Scalar, flat_ids
from moai.lower.operators import BOUNDS
from moai.lower.program import Instruction, Program
from moai.lower.program_order import passes
from moai.lower.regions import Region
from moai.runtime.direct import direct
from moai.runtime.loops import BEGIN_PART, REPEAT

LINES_BEFORE = 3


@dataclass(frozen=True, slots=True)
class PerPass:
    """One number for each pass of the loop around it."""

    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Call:
    """A function and its arguments, in which only `Ref`, `Scalar` and `PerPass` are still open."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


# A region and what stands for it, by the index of its first instruction: a function of a list, which it empties.
Compiled = Mapping[int, tuple[Region, Callable[[list[Any]], Any]]]


def generate(
    program: Program,
    calls: Sequence[Call | None],
    carried: Sequence[int],
    compiled: Compiled,
    tick: Callable[[], None] | None = None,
) -> tuple[str, dict[str, Any]]:
    """The source of `run(inputs, scalars) -> list of outputs`, and the globals it needs.

    `calls` has None for the bounds of a loop; values `carried` from pass to pass begin as None. The lines of a
    compiled region stay empty but for the first. `tick` is called behind every instruction. `run` empties the list
    `inputs`, so that an input's memory can be freed at its last use.
    """
    constants = _Constants()
    lines = [
        "def run(inputs, scalars):",
        f"    {_targets(f'v{slot.id}' for slot in program.inputs)} = inputs; inputs.clear()",
        f"    {_targets(f's{i}' for i in range(program.n_scalars))} = scalars; {_cleared(carried)}",
    ]
    indent, part, ticking = "    ", 0, f"; {constants.named('f', tick)}()" if tick else ""
    end = 0  # of the last compiled region
    for index, (instruction, call) in enumerate(zip(program.instructions, calls, strict=True)):
        if index in compiled:
            region, function = compiled[index]
            end = region.stop
            lines.append(indent + _region_statement(region, constants.named("f", function)))
        elif index < end:
            lines.append("")
        elif call is not None:
            lines.append(indent + _statement(instruction, call, constants) + ticking)
        elif instruction.op == REPEAT:
            lines.append(f"    for part, i in {constants.named('order', passes(program, index))}:")
            indent, part = "        ", 0
        elif instruction.op == BEGIN_PART:
            empty = program.instructions[index + 1].op in BOUNDS
            lines.append(f"        if part == {part}:{' pass' * empty}")
            indent, part = "            ", part + 1
        else:
            indent = "    "
            lines.append(indent + (_cleared(instruction.frees) or "pass") + ticking)
    lines.append(f"    return [{', '.join(f'v{slot.id}' for slot in program.outputs)}]")
    return "\n".join(lines) + "\n", constants.globals


def _statement(instruction: Instruction, call: Call, constants: _Constants) -> str:
    args = [constants.source(a) for a in call.args]
    args += [f"{name}={constants.source(a)}" for name, a in call.kwargs.items()]
    statement = f"{constants.named('f', direct(call.function))}({', '.join(args)})"
    unused = False
    if any(True for _ in flat_ids(instruction.outs)):
        statement = f"{_target(instruction.outs)} = {statement}"
        unused = isinstance(instruction.outs, tuple) and "_" in _target(instruction.outs)
    dead = _cleared(instruction.frees, *["_"] * unused)
    return f"{statement}; {dead}" if dead else statement


def _cleared(ids: Iterable[int], *names: str) -> str:
    """The statement that lets go of values; "" if there are none."""
    targets = [*(f"v{id}" for id in ids), *names]
    return " = ".join([*targets, "None"]) if targets else ""


def _region_statement(region: Region, function: str) -> str:
    """The list alone holds what dies in the region."""
    given = f"given = [{', '.join(f'v{id}' for id in region.inputs)}]"
    call = f"{_targets(f'v{id}' for id in region.outputs)} = {function}(given)"
    return "; ".join(filter(None, (given, _cleared(region.frees), call)))


def _targets(names: Iterable[str]) -> str:
    return f"({''.join(f'{name}, ' for name in names)})"


def _target(outs: Any) -> str:
    if outs is None:
        return "_"
    return f"v{outs}" if isinstance(outs, int) else _targets(map(_target, outs))


class _Constants:
    """Names for everything that cannot be written as a literal."""

    def __init__(self) -> None:
        self.globals: dict[str, Any] = {}
        self._names: dict[int, str] = {}

    def named(self, prefix: str, value: Any) -> str:
        name = self._names.get(id(value))
        if name is None:
            name = self._names[id(value)] = f"{prefix}{len(self._names)}"
            self.globals[name] = value  # also keeps the value alive, so that its id stays its own
        return name

    def source(self, value: Any) -> str:
        if isinstance(value, Ref):
            return f"v{value.id}"
        if isinstance(value, Scalar):
            return f"s{value.index}"
        if isinstance(value, PerPass):
            return f"{self.named('c', value.values)}[i]"
        if isinstance(value, tuple):
            return f"({''.join(f'{self.source(v)}, ' for v in value)})"
        if isinstance(value, list):
            return f"[{', '.join(map(self.source, value))}]"
        if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self.named("c", value)
