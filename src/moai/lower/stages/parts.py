"""A stage's sections as its code: passes of a loop have a forward and a backward part, which need not be run in one go.

In: `StageCode`. Out: instructions. What the forward makes and the backward reads is handed on in lists, or made again
if it is a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moai.graph.step_graph import Ref, flat_ids
from moai.lower.cleanup import renamed_refs, uses
from moai.lower.operators import is_view
from moai.lower.program import Instruction
from moai.lower.stages.messages import StageCode
from moai.lower.stages.schedule import Order
from moai.lower.values import Values

_CARRIED = frozenset({"accumulate", "collect"})


def in_parts(stage: StageCode, in_turns: Sequence[bool], order: Order, values: Values) -> list[Instruction]:
    """`in_turns`: which sections are loops whose passes have two parts on all stages; these are run in `order`."""
    code: list[Instruction] = []
    for section, turns in zip(stage.sections, in_turns, strict=True):
        forward, backward = section["forward"], section["backward"]
        if turns and (forward or backward):
            handed = _HandedOn(forward, values)
            backward = handed.read_by(backward)
            begin = Instruction("begin_part", (), {}, None)
            loop = [Instruction("repeat", (order,), {}, None), begin, *forward, *handed.collects, begin, *backward]
            code += (*loop, Instruction("end_repeat", (), {}, None))
        elif forward or backward:
            ends = Instruction("repeat", (), {}, None), Instruction("end_repeat", (), {}, None)
            code += (ends[0], *forward, *backward, ends[1])
        code += section["whole"]
    return code


class _HandedOn:
    """What goes from the forward to the backward of a pass."""

    def __init__(self, forward: Sequence[Instruction], values: Values):
        self.collects: list[Instruction] = []
        self._values = values
        self._made = {o: i for i in forward if i.op not in _CARRIED for o in flat_ids(i.outs)}
        self._names: dict[int, int] = {}  # of what was made in the forward, in the backward
        self._found: list[Instruction] = []

    def read_by(self, backward: Sequence[Instruction]) -> list[Instruction]:
        """The backward, reading what it is handed."""
        for instruction in backward:
            self._found.append(self._renamed(instruction))
        return self._found

    def _renamed(self, instruction: Instruction) -> Instruction:
        names = {i: self._taken(i) for i in uses(instruction) if i in self._made}
        args, kwargs = renamed_refs((instruction.args, instruction.kwargs), names)
        return instruction if args is instruction.args else replace(instruction, args=args, kwargs=kwargs)

    def _taken(self, id_: int) -> int:
        if id_ not in self._names:
            source, values = self._made[id_], self._values
            fresh = values.new(values.type(id_), values.placement(id_))
            if is_view(source.op) and isinstance(source.outs, int):  # cheaper made again than kept
                self._found.append(replace(self._renamed(source), outs=fresh))
            else:
                list_ = values.new()
                self.collects.append(Instruction("collect", (Ref(id_),), {}, list_))
                shapes = (values.local_shape(fresh),)
                self._found.append(Instruction("take", (Ref(list_),), {}, fresh, (), shapes))
            self._names[id_] = fresh
        return self._names[id_]
