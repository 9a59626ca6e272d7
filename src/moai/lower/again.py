"""Regions compute again what is cheaper to compute than to keep.

In: the regions of a program. Out: the same regions, some of which begin with instructions of earlier ones (`again`),
whose results are then put out by none. A layer's backward thus has activations and the like from what it reads anyway:
the compiler fuses them into what needs them, and they are neither written nor read.

Taken is what goes element by element, where fewer numbers are moved then, and from what is there at that time anyway.
So nothing lives longer than before.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence

import torch

from moai.graph.step_graph import flat_ids
from moai.lower.cleanup import uses
from moai.lower.memory import SharedMemory
from moai.lower.on_meta import written
from moai.lower.operators import BOUNDS, BUILTINS, operator
from moai.lower.program import Instruction, Program
from moai.lower.regions import Region, is_plain_view, region_of

# What is computed again for one value, in instructions: more may take longer than reading it.
_MOST = 6


def computing_again(program: Program, regions: Sequence[Region]) -> tuple[Region, ...]:
    """`regions` of `program`, in order, as in the module docstring."""
    search = _Search(program, regions)
    for region in regions:
        for at in range(region.start, region.stop):
            search.consider(at, region)
    return tuple(search.result())


class _Search:
    """Positions are those of the program's instructions. A value is `dropped` when no region puts it out any more."""

    def __init__(self, program: Program, regions: Sequence[Region]) -> None:
        self._code = program.instructions
        self._regions = regions
        self._at = {at: region for region in regions for at in range(region.start, region.stop)}
        self._made = {o: at for at, i in enumerate(self._code) for o in flat_ids(i.outs)}
        self._readers: dict[int, list[int]] = defaultdict(list)
        self._freed: dict[int, int] = {}
        self._bounds = [at for at, i in enumerate(self._code) if i.op in BOUNDS]
        self._numel = {slot.id: slot.type.numel for slot in program.inputs if not slot.placement.shards}
        self._memory = SharedMemory()
        self._writes: dict[int, list[int]] = defaultdict(list)  # by the name of the set of values
        self._outputs = {slot.id for slot in program.outputs}
        self._again: dict[Region, set[int]] = {region: set() for region in regions}
        self._dropped: set[int] = set()
        self._follow()

    def _follow(self) -> None:
        for at, instruction in enumerate(self._code):
            self._memory.follow(instruction)
            for id_ in uses(instruction):
                self._readers[id_].append(at)
            self._freed.update(dict.fromkeys(instruction.frees, at))
            for id_, shape in zip(flat_ids(instruction.outs), instruction.shapes, strict=False):
                if all(isinstance(n, int) for n in shape):
                    self._numel[id_] = math.prod(shape)
        for at, instruction in enumerate(self._code):
            # The runtime's own may write in place, in the background or later.
            for id_ in uses(instruction) if instruction.op in BUILTINS else written(instruction):
                self._writes[self._memory.find(id_)].append(at)

    def consider(self, at: int, region: Region) -> None:
        """Drop what the instruction at `at` makes, if every reader of it can compute it again and that pays."""
        value = self._code[at].outs
        if value not in region.outputs or value in self._outputs or value not in self._numel:
            return
        readers = self._reading_regions(value, region)
        if not readers:
            return
        chains = {reader: self._chain(value, reader) for reader in readers}
        moved = self._numel[value]
        for reader, chain in chains.items():
            if chain is None:
                return
            fresh = set(chain[1]).difference(reader.inputs)
            moved += self._numel[value] - sum(self._numel[i] for i in fresh)
        if moved > 0:
            self._dropped.add(value)
            for reader, chain in chains.items():
                assert chain is not None
                self._again[reader].update(chain[0])

    def _reading_regions(self, value: int, maker: Region) -> list[Region]:
        """The regions behind `maker` that read the value; none if others do, or write into it."""
        found: dict[Region, None] = {}
        for at in self._readers[value]:
            region = self._at.get(at)
            if region is None:
                return []
            found[region] = None
        found.pop(maker, None)
        writes = self._writes[self._memory.find(value)]
        alone = next(iter(found)) if len(found) == 1 else None
        if any(alone is None or self._at.get(at) is not alone for at in writes):
            return []
        return list(found)

    def _chain(self, value: int, reader: Region) -> tuple[set[int], set[int]] | None:
        """The instructions that make `value` of what is there when `reader` begins, and what they read of that."""
        positions: set[int] = set()
        leaves: set[int] = set()
        wanted = [value]
        while wanted:
            at = self._made.get(wanted.pop())
            if at is None or at not in self._at or not _is_by_element(self._code[at]) or len(positions) == _MOST:
                return None
            positions.add(at)
            for id_ in uses(self._code[at]):
                if self._is_there(id_, at, reader):
                    leaves.add(id_)
                elif self._made.get(id_) not in positions:
                    if any(w < reader.start for w in self._writes[self._memory.find(id_)]):
                        return None
                    wanted.append(id_)
        return positions, leaves

    def _is_there(self, id_: int, at: int, reader: Region) -> bool:
        """Whether the value that is read at `at` is there, the same, when `reader` begins."""
        maker = self._at.get(self._made.get(id_, -1))
        inside = maker is not None and id_ not in maker.outputs
        if inside or id_ in self._dropped or id_ not in self._numel:
            return False
        if self._freed.get(id_, len(self._code)) < reader.start:
            return False
        if any(at < bound < reader.start for bound in self._bounds):
            return False
        return not any(at < w < reader.start for w in self._writes[self._memory.find(id_)])

    def result(self) -> list[Region]:
        """The regions as they are now."""
        found = []
        for region in self._regions:
            again = tuple(sorted(self._again[region]))
            outputs = tuple(o for o in region.outputs if o not in self._dropped)
            if again or outputs != region.outputs:
                region = region_of(self._code, region.start, region.stop, outputs, again)
            found.append(region)
        return found


def _is_by_element(instruction: Instruction) -> bool:
    """Whether each number of the result is made of one of each argument."""
    if is_plain_view(instruction):
        return True
    return torch.Tag.pointwise in operator(instruction.op).tags and not written(instruction)
