"""A device's sections as its code: passes of a loop have several parts, which need not be run in one go.

In: `StageCode`. Out: instructions. What one part makes and a later one reads is handed on in lists, or made again if it
is a view.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from moai.graph.step_graph import Ref, flat_ids
from moai.lower.cleanup import renamed_refs, uses
from moai.lower.operators import is_view
from moai.lower.program import Instruction
from moai.lower.stages.messages import StageCode
from moai.lower.stages.weights import inputs_and_weights
from moai.lower.values import Values
from moai.plan.schedule import Order

_CARRIED = frozenset({"accumulate", "collect"})


def in_parts(
    stage: StageCode, in_turns: Sequence[bool], order: Order, weights_apart: bool, values: Values
) -> list[Instruction]:
    """`in_turns`: which sections are loops whose parts are run in `order`; others have passes of one part.
    `weights_apart`: there is one backward, which becomes two parts."""
    n_parts = 1 + max(part for part, _ in order)
    code: list[Instruction] = []
    for number, (section, turns) in enumerate(zip(stage.sections, in_turns, strict=True)):
        parts = [section[part] for part in sorted(section)]
        if turns and parts:
            parts = [section.get(part, []) for part in range(n_parts)]
            if weights_apart:
                parts[1:] = inputs_and_weights(section.get(1, []), values.local_bytes)
            handed = _HandedOn(parts, values).parts
            begin = Instruction("begin_part", (), {}, None)
            loop = [instruction for part in handed for instruction in (begin, *part)]
            code += (Instruction("repeat", (order,), {}, None), *loop, Instruction("end_repeat", (), {}, None))
            continue
        own = [instruction for part in parts for instruction in part]
        if number % 2 and own:
            code += (Instruction("repeat", (), {}, None), *own, Instruction("end_repeat", (), {}, None))
        else:
            code += own
    return code


class _HandedOn:
    """The parts of a pass, each reading what it is handed. What several later parts read goes from one to the next, so
    that it is let go of behind the last of them."""

    def __init__(self, parts: Sequence[Sequence[Instruction]], values: Values):
        self.parts: list[list[Instruction]] = []
        self._values = values
        self._made: dict[int, Instruction] = {}
        self._name: dict[int, int] = {}  # of a value, in the last part that has it
        self._place: dict[int, int] = {}  # that part
        self._collects: list[list[Instruction]] = [[] for _ in parts]
        for number, part in enumerate(parts):
            self.parts.append([])
            for instruction in part:
                self.parts[-1].append(self._renamed(instruction, number))
                if instruction.op not in _CARRIED:
                    self._made.update(dict.fromkeys(flat_ids(instruction.outs), instruction))
                    self._name.update((o, o) for o in flat_ids(instruction.outs))
                    self._place.update(dict.fromkeys(flat_ids(instruction.outs), number))
        for found, collects in zip(self.parts, self._collects, strict=True):
            found += collects

    def _renamed(self, instruction: Instruction, part: int) -> Instruction:
        names = {i: self._taken(i, part) for i in uses(instruction) if i in self._made}
        args, kwargs = renamed_refs((instruction.args, instruction.kwargs), names)
        return instruction if args is instruction.args else replace(instruction, args=args, kwargs=kwargs)

    def _taken(self, id_: int, part: int) -> int:
        """The name of a value in `part`."""
        if self._place[id_] == part:
            return self._name[id_]
        source, values = self._made[id_], self._values
        fresh = values.new(values.type(id_), values.placement(id_))
        if is_view(source.op) and isinstance(source.outs, int):  # cheaper made again than kept
            self.parts[part].append(replace(self._renamed(source, part), outs=fresh))
        else:
            list_ = values.new()
            self._collects[self._place[id_]].append(Instruction("collect", (Ref(self._name[id_]),), {}, list_))
            shapes = (values.local_shape(fresh),)
            self.parts[part].append(Instruction("take", (Ref(list_),), {}, fresh, (), shapes))
        self._name[id_], self._place[id_] = fresh, part
        return fresh
