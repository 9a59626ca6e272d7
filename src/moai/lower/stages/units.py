"""Units: what is done on one stage as a whole.

In: instructions. Out: a unit for each of them, or, where an instruction works on lists of tensors that are independent
of each other (foreach, fused optimizers), one for each position of the lists; and instructions for some of them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moai.graph.step_graph import Node, Origin, flat_ids, refs
from moai.lower.cleanup import uses
from moai.lower.lanes import lanes_of
from moai.lower.operators import BOUNDS, BUILTINS, operator
from moai.lower.program import Instruction


@dataclass(frozen=True, slots=True)
class Unit:
    """Instruction `at`, or lane `lane` of it. `section` counts loops (odd) and what is around them (even)."""

    at: int
    section: int
    uses: tuple[int, ...]
    outs: tuple[int, ...]
    lane: int | None = None

    @property
    def in_loop(self) -> bool:
        return self.section % 2 == 1


def units_of(code: Sequence[Instruction]) -> list[Unit]:
    """In order; the bounds of loops are none."""
    found: list[Unit] = []
    section = 0
    for at, instruction in enumerate(code):
        if instruction.op in BOUNDS:
            section += 1
            continue
        lanes = _lanes(instruction)
        if lanes is None:
            found.append(Unit(at, section, tuple(uses(instruction)), tuple(flat_ids(instruction.outs))))
        else:
            found += (Unit(at, section, given, made, k) for k, (given, made) in enumerate(lanes))
    return found


def _lanes(instruction: Instruction) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """What each lane reads and makes; all of them read what is in no list."""
    if instruction.op in BUILTINS:
        return None
    node = Node(operator(instruction.op), instruction.args, instruction.kwargs, instruction.outs, Origin("forward"))
    lanes = lanes_of(node)
    if lanes is None:
        return None
    ids = [r.id for r in refs((instruction.args, instruction.kwargs))]
    outs = flat_ids(instruction.outs)
    shared = set(range(len(ids))) - {p for lane in lanes for p in lane.inputs}
    return [
        (tuple(ids[p] for p in sorted({*lane.inputs, *shared})), tuple(outs[p] for p in lane.outputs)) for lane in lanes
    ]


def with_lanes(instruction: Instruction, lanes: Collection[int]) -> Instruction:
    """`instruction` for some of its lanes alone."""
    outs = instruction.outs
    n = len(outs) if all(isinstance(o, int) for o in outs) else max(map(len, outs))
    if len(lanes) == n:
        return instruction
    chosen = sorted(lanes)

    def picked(value: Any) -> Any:
        is_list = isinstance(value, (tuple, list)) and len(value) == n
        return type(value)(value[k] for k in chosen) if is_list else value

    shapes = dict(zip(flat_ids(outs), instruction.shapes, strict=True))
    own = picked(outs) if all(isinstance(o, int) for o in outs) else tuple(map(picked, outs))
    return replace(
        instruction,
        args=tuple(map(picked, instruction.args)),
        kwargs={name: picked(value) for name, value in instruction.kwargs.items()},
        outs=own,
        shapes=tuple(shapes[o] for o in flat_ids(own)),
    )
