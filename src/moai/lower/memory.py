"""Which values share memory, and when the last use of each is.

In: the final instructions. Out: the same with `frees` filled in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import is_view
from moai.lower.program import Instruction


class SharedMemory:
    """Sets of values that share memory. A set is named by the value it began with."""

    def __init__(self) -> None:
        self._name: dict[int, int] = {}
        self._members: dict[int, list[int]] = {}

    def find(self, id_: int) -> int:
        """The name of the set that `id_` is in."""
        return self._name.get(id_, id_)

    def members(self, id_: int) -> list[int]:
        """Everything that shares memory with `id_`, itself included."""
        return self._members.get(self.find(id_), [id_])

    def join(self, id_: int, with_: int) -> None:
        """The set of `id_` becomes part of that of `with_`."""
        source, target = self.find(id_), self.find(with_)
        if source != target:
            moved = self._members.pop(source, [source])
            self._members.setdefault(target, [target]).extend(moved)
            self._name.update(dict.fromkeys(moved, target))

    def follow(self, instruction: Instruction) -> None:
        """Take note of an instruction's results: those of a view lie where its arguments do."""
        if is_view(instruction.op):
            for out in flat_ids(instruction.outs):
                for source in uses(instruction):
                    self.join(out, source)


def with_frees(code: Sequence[Instruction], kept: Collection[int]) -> list[Instruction]:
    """`code` with what each instruction frees: what is used no more. `kept` stays: outputs, and what is borrowed.

    What a loop uses from outside is freed at its end, since every pass uses it.
    """
    needed = set(kept)
    from_outside = _used_from_outside(code)
    out = []
    for at in range(len(code) - 1, -1, -1):
        instruction = code[at]
        touched = from_outside.get(at) or dict.fromkeys((*uses(instruction), *flat_ids(instruction.outs)))
        frees = tuple(i for i in touched if i not in needed)
        needed.update(frees)
        out.append(replace(instruction, frees=frees) if frees else instruction)
    return out[::-1]


def _used_from_outside(code: Sequence[Instruction]) -> dict[int, dict[int, None]]:
    """For the end of each loop, by its position: values that the loop uses and does not make."""
    found: dict[int, dict[int, None]] = {}
    begin = None
    for at, instruction in enumerate(code):
        if instruction.op == "repeat":
            begin = at
        elif instruction.op == "end_repeat":
            body = code[begin:at]
            own = {o for i in body if i.op != "collect" for o in flat_ids(i.outs)}  # a list is read in every pass
            found[at] = dict.fromkeys(u for i in body for u in uses(i) if u not in own)
            begin = None
    return found
