"""Micro-batches in time: instructions that differ from pass to pass are put into loops.

In: straight-line instructions in which values split or left in terms over "micro" stand for one micro-batch, and
`micro_sum` and `micro_join` for what needs all of them. Out: the same with loops spelled out (see `program`).

A sum over micro-batches is there only behind a loop, so who needs one runs later: before, in, or behind another loop.
A program alternates between straight parts (even places) and loops (odd ones), and every instruction is put as late as
its users allow: the labels are counted in a small loop of their own, and the forward runs together with the backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

from moai.graph.step_graph import Ref, flat_ids
from moai.lower.cleanup import renamed_refs, uses
from moai.lower.moving import MICRO_JOIN, MICRO_SUM
from moai.lower.operators import is_view
from moai.lower.program import Instruction
from moai.lower.values import Values

_ENDS = frozenset({MICRO_SUM, MICRO_JOIN})


def in_loops(
    code: Sequence[Instruction], outputs: Sequence[int], remade: set[int], values: Values
) -> list[Instruction]:
    """`remade`: values that are the same in every pass, and yet to be made anew in each (and dropped)."""
    if not any(values.varies(o) for i in code for o in flat_ids(i.outs)):
        return list(code)
    return _Timetable(code, outputs, remade, values).emit()


class _Timetable:
    """The place of every instruction."""

    def __init__(self, code: Sequence[Instruction], outputs: Sequence[int], remade: set[int], values: Values):
        self._code = code
        self._values = values
        self._made = {o: at for at, i in enumerate(code) for o in flat_ids(i.outs)}
        self._varies = [i.op in _ENDS or any(map(values.varies, flat_ids(i.outs))) for i in code]
        last = 2 * max(self._levels())
        self._place = self._places(outputs, last, self._closed(remade))

    def _levels(self) -> list[int]:
        """How many loops must be over before each instruction's results are there."""
        level: list[int] = []
        for at, instruction in enumerate(self._code):
            before = max((level[self._made[i]] for i in uses(instruction) if i in self._made), default=0)
            level.append(before + (self._code[at].op in _ENDS))
        return level

    def _closed(self, remade: set[int]) -> list[bool]:
        """Instructions whose results are to be remade: also what depends on such and is the same in every pass."""
        found: list[bool] = []
        for at, instruction in enumerate(self._code):
            derived = any(found[self._made[i]] for i in uses(instruction) if i in self._made)
            own = not remade.isdisjoint(flat_ids(instruction.outs))
            found.append(not self._varies[at] and (own or (derived and is_view(instruction.op))))
        return found

    def _places(self, outputs: Sequence[int], last: int, remade: list[bool]) -> list[int]:
        place = [last] * len(self._code)
        due: dict[int, list[int]] = defaultdict(list)  # value -> places of its users
        for id_ in outputs:
            due[id_].append(last)
        for at in range(len(self._code) - 1, -1, -1):
            instruction = self._code[at]
            users = [p for o in flat_ids(instruction.outs) for p in due[o]]
            limit = min(users, default=last)
            if instruction.op in _ENDS:
                place[at] = limit - 1 if limit % 2 == 0 else limit - 2
            elif self._varies[at] or (remade[at] and set(users) == {limit} and limit % 2):
                assert limit % 2, f"{instruction} is used outside of a loop"
                place[at] = limit
            else:
                place[at] = limit - limit % 2
            for id_ in uses(instruction):
                due[id_].append(place[at])
        return place

    # -- emission

    def emit(self) -> list[Instruction]:
        parts: dict[int, list[Instruction]] = defaultdict(list)
        joins: dict[int, list[Instruction]] = defaultdict(list)
        self._imports: dict[tuple[int, int], int] = {}
        for at in self._order():
            place = self._place[at]
            instruction = self._code[at]
            if place % 2:
                instruction = self._with_imports(instruction, place, parts)
            if instruction.op == MICRO_SUM:
                instruction = replace(instruction, op="accumulate", args=(instruction.args[0], False))
            elif instruction.op == MICRO_JOIN:
                list_ = self._values.new()
                joined = replace(instruction, op="join", args=(Ref(list_), instruction.args[1]))
                joins[place].append(joined)
                instruction = replace(instruction, op="collect", args=instruction.args[:1], outs=list_, shapes=())
            parts[place].append(instruction)
        out: list[Instruction] = []
        for place in sorted(parts):
            if place % 2:
                begin, end = Instruction("repeat", (), {}, None), Instruction("end_repeat", (), {}, None)
                out += (begin, *parts[place], end, *joins[place])
            else:
                out += parts[place]
        return out

    def _order(self) -> list[int]:
        """Sums and joins come right behind what they are of, so that it can go."""

        def key(at: int) -> tuple[int, int]:
            instruction = self._code[at]
            if instruction.op not in _ENDS:
                return at, 0
            return self._made.get(instruction.args[0].id, -1), 1

        return sorted(range(len(self._code)), key=key)

    def _with_imports(self, instruction: Instruction, place: int, parts: dict[int, list[Instruction]]) -> Instruction:
        """`instruction` in the loop at `place`, with what earlier loops made handed on to it."""
        renamed = {i: new for i in uses(instruction) if (new := self._imported(i, place, parts)) != i}
        if not renamed:
            return instruction
        args, kwargs = renamed_refs((instruction.args, instruction.kwargs), renamed)
        return replace(instruction, args=args, kwargs=kwargs)

    def _imported(self, id_: int, place: int, parts: dict[int, list[Instruction]]) -> int:
        at = self._made.get(id_)
        if at is None or not self._varies[at] or self._code[at].op in _ENDS or self._place[at] == place:
            return id_
        key = (id_, place)
        if key not in self._imports:
            source = self._code[at]
            if is_view(source.op) and isinstance(source.outs, int):  # cheaper made again than kept
                again = self._with_imports(source, place, parts)
                fresh = self._copy_of(id_)
                parts[place].append(replace(again, outs=fresh))
            else:
                fresh = self._handed_on(id_, at, place, parts)
            self._imports[key] = fresh
        return self._imports[key]

    def _handed_on(self, id_: int, at: int, place: int, parts: dict[int, list[Instruction]]) -> int:
        list_ = self._values.new()
        parts[self._place[at]].append(Instruction("collect", (Ref(id_),), {}, list_))
        fresh = self._copy_of(id_)
        shapes = (self._values.local_shape(fresh),)
        parts[place].append(Instruction("take", (Ref(list_),), {}, fresh, (), shapes))
        return fresh

    def _copy_of(self, id_: int) -> int:
        return self._values.new(self._values.type(id_), self._values.placement(id_))
