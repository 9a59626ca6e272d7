"""Which values share memory, when the last of them goes, and how much a device holds at most.

In: the final instructions. Out: the same with `frees` filled in, and predicted bytes.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.operators import STARTS, is_view
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
            own = {o for i in body for o in flat_ids(i.outs)}
            found[at] = dict.fromkeys(u for i in body for u in uses(i) if u not in own)
            begin = None
    return found


def peak_bytes(code: Sequence[Instruction], inputs: Sequence[int], values: Values) -> int:
    """The most that the largest device holds at any time, inputs included (workspaces inside kernels are not).

    The second pass of a loop, when its sums exist already, stands for all later ones.
    """
    ledger = _Ledger(inputs, values)
    at, begin, passes = 0, 0, 0
    while at < len(code):
        instruction = code[at]
        ledger.add(instruction)
        if instruction.op == "repeat":
            begin, passes = at, 0
        elif instruction.op == "end_repeat" and passes == 0:
            at, passes = begin, 1
        at += 1
    return ledger.peak


class _Ledger:
    """Bytes by region, and the most that they ever were."""

    def __init__(self, inputs: Sequence[int], values: Values):
        self._values = values
        self._regions = Regions()
        self._strided: set[int] = set()
        self._freed: set[int] = set()
        self._held = {i: values.local_bytes(i) for i in inputs}
        self._now = self.peak = sum(self._held.values())

    def add(self, instruction: Instruction) -> None:
        if not _copies(instruction, self._strided):
            self._regions.follow(instruction)
        self._freed.difference_update(flat_ids(instruction.outs))  # made again in another pass
        if instruction.op == "wait":  # its results are views of the buffer that the handle stood for
            self._drop(instruction.args[0].id)
        if instruction.op == "accumulate" and instruction.args[1] and instruction.outs not in self._held:
            self._drop(self._regions.find(instruction.args[0].id))
        for out in flat_ids(instruction.outs):
            if self._regions.find(out) == out:
                self._hold(out, self._new_bytes(out, instruction))
        self.peak = max(self.peak, self._now)
        self._freed.update(instruction.frees)
        for region in {self._regions.find(i) for i in instruction.frees}:
            if self._freed.issuperset(self._regions.members(region)):
                self._drop(region)

    def _hold(self, region: int, nbytes: int) -> None:
        self._now += nbytes - self._held.get(region, 0)
        self._held[region] = nbytes

    def _drop(self, region: int) -> None:
        self._now -= self._held.pop(region, 0)

    def _new_bytes(self, out: int, instruction: Instruction) -> int:
        values = self._values
        if instruction.op in STARTS:
            return values.bucket_bytes(out)
        if instruction.op == "collect":
            return values.local_bytes(instruction.args[0].id) * values.mesh.steps
        return 0 if instruction.op == "take" else values.local_bytes(out)


def _copies(instruction: Instruction, strided: set[int]) -> bool:
    """Whether a view has to be taken to be a copy: entries that lie apart are brought together to be reshaped.

    Takes note in `strided` of results that may not lie densely.
    """
    if instruction.op == "aten.reshape.default":
        return not strided.isdisjoint(uses(instruction))
    if is_view(instruction.op):
        strided.update(flat_ids(instruction.outs))
    return False
