"""Which values share memory, when the last of them goes, and how much a device holds at most.

In: the final instructions. Out: the same with `frees` filled in, and predicted bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import is_view
from moai.lower.program import Instruction
from moai.lower.values import Values


class Regions:
    """Sets of values that share memory. A region is named by the value it began with."""

    def __init__(self) -> None:
        self._region: dict[int, int] = {}
        self._members: dict[int, list[int]] = {}

    def find(self, id_: int) -> int:
        return self._region.get(id_, id_)

    def members(self, id_: int) -> list[int]:
        """Everything that shares memory with `id_`, itself included."""
        return self._members.get(self.find(id_), [id_])

    def join(self, id_: int, with_: int) -> None:
        """The region of `id_` becomes part of that of `with_`."""
        source, target = self.find(id_), self.find(with_)
        if source != target:
            moved = self._members.pop(source, [source])
            self._members.setdefault(target, [target]).extend(moved)
            self._region.update(dict.fromkeys(moved, target))

    def follow(self, instruction: Instruction) -> None:
        """Take note of an instruction's results: those of a view lie where its arguments do."""
        if is_view(instruction.op):
            for out in flat_ids(instruction.outs):
                for source in uses(instruction):
                    self.join(out, source)


def with_frees(code: Sequence[Instruction], kept: Collection[int]) -> list[Instruction]:
    """`code` with what each instruction frees: what is used no more. `kept` stays: outputs, and what is borrowed."""
    needed = set(kept)
    out = []
    for instruction in reversed(code):
        touched = dict.fromkeys((*uses(instruction), *flat_ids(instruction.outs)))
        frees = tuple(i for i in touched if i not in needed)
        needed.update(frees)
        out.append(replace(instruction, frees=frees) if frees else instruction)
    return out[::-1]


def peak_bytes(code: Sequence[Instruction], inputs: Sequence[int], values: Values) -> int:
    """The most that the largest device holds at any time, inputs included (workspaces inside kernels are not)."""
    regions = Regions()
    strided: set[int] = set()
    freed: set[int] = set()
    held = {i: values.local_bytes(i) for i in inputs}  # bytes by region
    now = peak = sum(held.values())
    for instruction in code:
        if not _copies(instruction, strided):
            regions.follow(instruction)
        fresh = {o: _new_bytes(o, instruction, values) for o in flat_ids(instruction.outs) if regions.find(o) == o}
        if instruction.op == "wait":  # the sums are views of the buffer that the handle stood for
            (handle,) = uses(instruction)
            now -= held.pop(handle)
        held |= fresh
        now += sum(fresh.values())
        peak = max(peak, now)
        freed.update(instruction.frees)
        for region in {regions.find(i) for i in instruction.frees}:
            if freed.issuperset(regions.members(region)):
                now -= held.pop(region, 0)
    return peak


def _copies(instruction: Instruction, strided: set[int]) -> bool:
    """Whether a view has to be taken to be a copy: entries that lie apart are brought together to be reshaped.

    Takes note in `strided` of results that may not lie densely.
    """
    if instruction.op == "aten.reshape.default":
        return not strided.isdisjoint(uses(instruction))
    if is_view(instruction.op):
        strided.update(flat_ids(instruction.outs))
    return False


def _new_bytes(out: int, instruction: Instruction, values: Values) -> int:
    if instruction.op == "all_reduce_start":
        return sum(values.local_bytes(i) for i in uses(instruction))
    return values.local_bytes(out)
