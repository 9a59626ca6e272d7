"""Regions: runs of instructions that a compiler can fuse.

Most instructions either move much memory and compute little (element by element, sums over a dim), or are one large
kernel (a matrix product, attention) or an exchange between devices. A region is a run of the first kind. `gathered`
orders functional instructions so that regions are as long as they can be; `regions` finds them in a finished program,
whatever has been made to write in place since. The layers of a model give equal regions: nothing in a region says whose
it is.

In: functional instructions. Out: the same in another order, in which

- what can be fused waits until something that cannot be needs one of the results, and then goes together;
- everybody has its own views: a region takes and gives whole tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, TypeVar

import torch

from moai.graph.placement import TIME
from moai.graph.step_graph import Scalar, flat_ids
from moai.lower.cleanup import renamed_refs, uses
from moai.lower.on_meta import written
from moai.lower.operators import BOUNDS, BUILTINS, is_view, operator
from moai.lower.program import Instruction, PerRank, Program
from moai.lower.values import Values

aten = torch.ops.aten

# Of one tensor, giving one tensor; each costs next to nothing wherever it stands.
_VIEWS = frozenset(
    {
        aten.reshape.default, aten.permute.default, aten.expand.default, aten.slice.Tensor, aten.select.int,
        aten.squeeze.dim, aten.squeeze.dims, aten.unsqueeze.default,
    }
)  # fmt: skip
# Beside the operators that PyTorch calls pointwise or a reduction.
_FUSED = frozenset(
    {
        aten._to_copy.default, aten.cat.default, aten.constant_pad_nd.default, aten.slice_backward.default,
        aten.select_backward.default, aten.full.default, aten.arange.default, aten.arange.start,
        aten.arange.start_step, aten.tril.default, aten.triu.default,
        aten._softmax.default, aten._softmax_backward_data.default,
        aten._log_softmax.default, aten._log_softmax_backward_data.default,
        aten.nll_loss_forward.default, aten.nll_loss_backward.default,
        aten.native_layer_norm.default, aten.native_layer_norm_backward.default,
    }
)  # fmt: skip


T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Region:
    """Instructions [start, stop) of a program, and before them those of earlier regions that it does `again`. `inputs`
    are the values from before that they read or write, `outputs` those that they define and that are used behind them,
    `frees` what is freed by them of these inputs."""

    start: int
    stop: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    frees: tuple[int, ...]
    again: tuple[int, ...] = ()

    def of(self, sequence: Sequence[T]) -> list[T]:
        """The region's part of what goes with the instructions, one by one."""
        return [*(sequence[at] for at in self.again), *sequence[self.start : self.stop]]


def gathered(code: Sequence[Instruction], outputs: Iterable[int], values: Values) -> list[Instruction]:
    """`code` in the order of the module docstring, within and between its loops. `outputs` are needed behind it."""
    out: list[Instruction] = []
    needed = set(outputs)
    for section in reversed(_sections(code)):
        walk = _Gathering(values)
        for instruction in section:
            walk.add(instruction)
        walk.flush()
        walk.write_views(o for i in section for o in flat_ids(i.outs) if o in needed)
        needed.update(id_ for i in section for id_ in uses(i))
        out = walk.out + out
    return out


def _sections(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """`code` cut at the bounds of loops, which are sections of their own."""
    sections: list[list[Instruction]] = [[]]
    for instruction in code:
        if instruction.op in BOUNDS:
            sections += [[instruction], []]
        else:
            sections[-1].append(instruction)
    return sections


class _Gathering:
    """One pass over the code. `_fused` is the region under way; `_queue` holds what cannot be fused since the first
    instruction that needs it, in order: nothing overtakes a collective."""

    def __init__(self, values: Values):
        self.out: list[Instruction] = []
        self._values = values
        self._views: dict[int, Instruction] = {}
        self._written: set[int] = set()  # views that stand outside of regions
        self._fused: list[Instruction] = []
        self._queue: list[Instruction] = []
        self._from_fused: set[int] = set()
        self._from_queue: set[int] = set()
        self._sums: dict[int, list[int]] = {}  # by the handle that they are awaited with

    def add(self, instruction: Instruction) -> None:
        """Views are left out: they are written where they are used."""
        if is_plain_view(instruction):
            self._views[instruction.outs] = instruction
            return
        needed = {self._source(i) for i in uses(instruction)}
        results = {*flat_ids(instruction.outs), *self._changed(instruction)}
        if is_fusable(instruction):
            if not needed.isdisjoint(self._from_queue):
                self.flush()
            self._fused.append(instruction)
            self._from_fused.update(results)
        elif self._queue or not needed.isdisjoint(self._from_fused):
            self._queue.append(instruction)
            self._from_queue.update(results)
        else:
            self._write(instruction)

    def flush(self) -> None:
        """Write the region under way, and what has waited for it."""
        names: dict[int, int] = {}  # of views, inside of the region
        for instruction in self._fused:
            for id_ in uses(instruction):
                self._copy_view(id_, names)
            args, kwargs = renamed_refs((instruction.args, instruction.kwargs), names)
            self.out.append(replace(instruction, args=args, kwargs=kwargs))
        for instruction in self._queue:
            self._write(instruction)
        for waiting in (self._fused, self._queue, self._from_fused, self._from_queue):
            waiting.clear()

    def write_views(self, ids: Iterable[int]) -> None:
        """Write those of `ids` that are views, unless they have been."""
        for id_ in ids:
            view = self._views.get(id_)
            if view is not None and id_ not in self._written:
                self._written.add(id_)
                self._write(view)

    def _write(self, instruction: Instruction) -> None:
        self.write_views(uses(instruction))
        self.out.append(instruction)

    def _copy_view(self, id_: int, names: dict[int, int]) -> None:
        view = self._views.get(id_)
        if view is None or id_ in names:
            return
        for source in uses(view):
            self._copy_view(source, names)
        names[id_] = self._values.new(self._values.types[id_], self._values.placement(id_))
        self.out.append(replace(view, args=renamed_refs(view.args, names), outs=names[id_]))

    def _changed(self, instruction: Instruction) -> Iterable[int]:
        """What is made in the memory of a bucket: by the terms' operators, and by the sum until it has been awaited."""
        if instruction.op == "wait":
            return self._sums.get(instruction.args[0].id, ())
        if instruction.kwargs.get("in_place"):
            self._sums[instruction.outs] = [x.id for x in instruction.args[0]]
            return self._sums[instruction.outs]
        return () if instruction.op in BUILTINS else written(instruction)

    def _source(self, id_: int) -> int:
        """The tensor that a view is one of."""
        while id_ in self._views:
            (id_,) = uses(self._views[id_])
        return id_


def regions(program: Program) -> tuple[Region, ...]:
    """The regions of a program with `frees`: those with anything to fuse, and whose views stay inside."""
    code = program.instructions
    last_use = {id_: at for at, instruction in enumerate(code) for id_ in uses(instruction)}
    last_use |= {slot.id: len(code) for slot in program.outputs}
    found = []
    for start, stop in _runs(code):
        region = _region(code, start, stop, last_use)
        if region is not None:
            found.append(region)
    return tuple(found)


def _runs(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """Bounds of the longest runs that can be fused, without views at their ends that others need."""
    runs = []
    start = stop = count = 0
    for at, instruction in enumerate(code):
        if is_plain_view(instruction):
            continue
        if is_fusable(instruction):
            stop, count = at + 1, count + 1
            continue
        if count > 1:
            runs.append((start, stop))
        start, count = at + 1, 0
    if count > 1:
        runs.append((start, stop))
    return runs


def _region(code: Sequence[Instruction], start: int, stop: int, last_use: dict[int, int]) -> Region | None:
    run = code[start:stop]
    outputs = [o for instruction in run for o in flat_ids(instruction.outs) if last_use.get(o, -1) >= stop]
    views = {instruction.outs for instruction in run if is_plain_view(instruction)}
    if not views.isdisjoint(outputs):
        return None
    return region_of(code, start, stop, tuple(outputs))


def region_of(
    code: Sequence[Instruction], start: int, stop: int, outputs: tuple[int, ...], again: tuple[int, ...] = ()
) -> Region:
    """Instructions [start, stop) of `code` as a region with these outputs."""
    bare = Region(start, stop, (), outputs, (), again)
    inside = {o for instruction in bare.of(code) for o in flat_ids(instruction.outs)}
    inputs = dict.fromkeys(i for instruction in bare.of(code) for i in uses(instruction) if i not in inside)
    frees = [i for instruction in code[start:stop] for i in instruction.frees if i not in inside]
    return replace(bare, inputs=tuple(inputs), frees=tuple(frees))


def is_plain_view(instruction: Instruction) -> bool:
    """Whether the result can be had anywhere at no cost: a view of one tensor."""
    return _is_plain_view(instruction.op) and _is_fixed(instruction)


@cache
def _is_plain_view(name: str) -> bool:
    return name not in BUILTINS and operator(name) in _VIEWS


def is_fusable(instruction: Instruction) -> bool:
    """Whether a compiler can fuse the instruction with its like: its numbers never change."""
    return _is_fusable(instruction.op) and _is_fixed(instruction)


@cache
def _is_fusable(name: str) -> bool:
    if name in BUILTINS:
        return False
    op = _functional(name)
    if op.namespace != "aten" or torch.Tag.nondeterministic_seeded in op.tags or is_view(str(op)):
        return False
    return op in _FUSED or torch.Tag.pointwise in op.tags or torch.Tag.reduction in op.tags


def _functional(name: str) -> torch._ops.OpOverload:
    """The operator `name`, or, if that writes in place, the one that gives the same as a fresh tensor."""
    space, packet, overload = name.split(".")
    if torch.Tag.inplace in operator(name).tags and hasattr(getattr(torch.ops, space), packet[:-1]):
        return operator(f"{space}.{packet[:-1]}.{overload}")
    return operator(name)


def _is_fixed(instruction: Instruction) -> bool:
    return not _is_open((instruction.args, instruction.kwargs, instruction.shapes))


def _is_open(value: Any) -> bool:
    """Whether a number in (nested) arguments is known at the run, or in the pass, only."""
    if isinstance(value, (tuple, list)):
        return any(map(_is_open, value))
    if isinstance(value, dict):
        return any(map(_is_open, value.values()))
    return isinstance(value, Scalar) or (isinstance(value, PerRank) and TIME in value.axes)
