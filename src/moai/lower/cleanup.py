"""Removal of instructions that are not needed: dead ones, and repetitions of cheap ones.

In and out: functional instructions (nothing has been made to write in place yet).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from moai.graph.step_graph import Ref, flat_ids, map_args, refs
from moai.lower.operators import BUILTINS, is_view
from moai.lower.program import Instruction
from moai.lower.values import Values

# Holding on to a result of so many entries costs less than computing it again.
_SMALL = 4096


def uses(instruction: Instruction) -> Sequence[int]:
    """The values that an instruction reads, one entry a use. Every pass asks for them: they are remembered."""
    try:
        return instruction.remembered_uses
    except AttributeError:
        found = refs(instruction.args)
        if instruction.kwargs:
            found += refs(instruction.kwargs)
        ids = tuple([r.id for r in found])
        object.__setattr__(instruction, "remembered_uses", ids)
        return ids


def without_dead(code: Sequence[Instruction], outputs: Iterable[int]) -> list[Instruction]:
    """`code` without what contributes nothing to `outputs`."""
    needed = set(outputs)
    kept = []
    for instruction in reversed(code):
        if not needed.isdisjoint(flat_ids(instruction.outs)):
            needed.update(uses(instruction))
            kept.append(instruction)
    return kept[::-1]


def without_repetitions(code: Sequence[Instruction], values: Values) -> tuple[list[Instruction], dict[int, int]]:
    """`code` with views and small results computed once, and the names that were given up, with those to use.

    Large results stay where they are: keeping them alive would cost memory, and undo a recomputation on purpose.
    """
    renamed: dict[int, int] = {}
    seen: dict[Any, Any] = {}
    kept = []
    for instruction in code:
        args, kwargs = renamed_refs((instruction.args, instruction.kwargs), renamed)
        if args is not instruction.args:
            instruction = replace(instruction, args=args, kwargs=kwargs)
        if _is_cheap(instruction, values):
            # repr tells 1 from 1.0 and True, and 0.0 from -0.0. Parts of different tensors may be alike.
            lies = [(values.types[o], values.placement(o)) for o in flat_ids(instruction.outs)]
            key = (f"{instruction.op}{args!r}{kwargs!r}", *lies)
            first = seen.setdefault(key, instruction.outs)
            if first is not instruction.outs:
                renamed.update(zip(flat_ids(instruction.outs), flat_ids(first), strict=True))
                continue
        kept.append(instruction)
    return kept, renamed


def renamed_refs(args: Any, renamed: dict[int, int]) -> Any:
    """`args` with other values in place of those renamed; the same object where there are none."""
    if not renamed or all(r.id not in renamed for r in refs(args)):
        return args
    return map_args(args, lambda leaf: Ref(renamed.get(leaf.id, leaf.id)) if isinstance(leaf, Ref) else leaf)


def _is_cheap(instruction: Instruction, values: Values) -> bool:
    if instruction.op in BUILTINS:
        return False
    return is_view(instruction.op) or all(values.types[o].numel <= _SMALL for o in flat_ids(instruction.outs))
