"""Changes of placement, spelled out: slices, sums, gathers.

In: a value's placement and the one that is wanted. Out: the placement to make next on the way there, and the
instructions that make it.

What is summed is summed first (scattered at once where that is wanted), then sliced, then gathered: what makes parts
smaller comes before what makes them larger. Sums and gathers over "micro" stand as `micro_sum` and `micro_join` until
the loop is made (`loops`).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch

from moai.graph.placement import TIME, Mesh, Placement, Shard
from moai.graph.step_graph import Ref, TensorType
from moai.lower.program import Instruction
from moai.lower.values import Values, joined, offsets, per_rank, within

aten = torch.ops.aten

MICRO_SUM, MICRO_JOIN = "micro_sum", "micro_join"


def without_time(shard: Shard, mesh: Mesh) -> Shard | None:
    """The shard that is left when the parts of all passes are joined; None: it was over passes alone."""
    if shard.axes[-1] != TIME:
        return shard
    if len(shard.axes) == 1:
        return None
    return Shard(shard.dim, shard.axes[:-1], joined(shard.sizes, len(shard.sizes) // mesh.steps), shard.blocks)


def next_placement(now: Placement, wanted: Placement, mesh: Mesh, in_passes: Collection[str] = ()) -> Placement:
    """The placement to make next. `now` and `wanted` differ, and no axis is to become partial.

    `in_passes`: axes over which a pass scatters its own terms. What is added up over passes is then parts alone.
    """
    assert set(wanted.partial) <= set(now.partial), f"{now} cannot become {wanted}"
    open_ = [a for a in now.partial if a not in wanted.partial]
    for axis in open_:
        shard = wanted.shard_of(axis)
        if TIME in open_ and axis not in in_passes:
            continue
        if shard is not None and shard.axes == (axis,) and all(s.dim != shard.dim for s in now.shards):
            return _with(now, shard, partial=tuple(a for a in now.partial if a != axis))
    if TIME in open_:
        return replace(now, partial=tuple(a for a in now.partial if a != TIME))
    if open_:
        return replace(now, partial=tuple(a for a in now.partial if a not in open_))
    for shard in wanted.shards:
        if shard not in now.shards and _can_slice(now, shard, mesh):
            return _with(now, shard)
    gone = next(s for s in now.shards if s not in wanted.shards)
    left = without_time(gone, mesh) if gone.axes[-1] == TIME else None
    rest = tuple(s for s in now.shards if s is not gone)
    return replace(now, shards=rest) if left is None else _with(replace(now, shards=rest), left)


def _can_slice(now: Placement, shard: Shard, mesh: Mesh) -> bool:
    """Whether the part is cut out of what every device holds already."""
    present = next((s for s in now.shards if s.dim == shard.dim), None)
    others = [a for s in now.shards if s is not present for a in s.axes]
    if not set(shard.axes).isdisjoint(others):
        return False
    return present is None or present == without_time(shard, mesh)


def _with(placement: Placement, shard: Shard, **changes: Any) -> Placement:
    rest = [s for s in placement.shards if s.dim != shard.dim]
    return replace(placement, shards=tuple(sorted((*rest, shard), key=lambda s: s.dim)), **changes)


def moved(values: Values, id_: int, wanted: Placement, where: str) -> tuple[int, list[Instruction]]:
    """Value `id_` in `wanted`, which is one step away (`next_placement`), and the instructions that make it."""
    now = values.placement(id_)
    out = values.new(values.type(id_), wanted)
    summed = [a for a in now.partial if a not in wanted.partial]
    gained = [s for s in wanted.shards if s not in now.shards]
    if summed == [TIME]:
        return out, [_instruction(values, MICRO_SUM, (Ref(id_),), out, where)]
    if summed and gained:
        (shard,) = gained
        args = (Ref(id_), shard.axes, shard.dim, shard.sizes, shard.blocks)
        return out, [_instruction(values, "reduce_scatter", args, out, where)]
    if summed:
        axes = tuple(a for a, _ in values.mesh.axes if a in summed)
        return out, [_instruction(values, "all_reduce", (Ref(id_), axes, "sum"), out, where)]
    gone = next((s for s in now.shards if s not in wanted.shards), None)
    if gone is None or (gained and TIME in gained[0].axes):
        (shard,) = gained
        return out, _sliced(values, id_, shard, gone, out, where)
    if gone.axes[-1] == TIME:
        return out, _for_each_block(values, id_, MICRO_JOIN, (), gone, out, where)
    args = (Ref(id_), gone.axes, gone.dim, gone.sizes, gone.blocks)
    return out, [_instruction(values, "all_gather", args, out, where)]


def _instruction(values: Values, op: str, args: tuple[Any, ...], out: int, where: str) -> Instruction:
    return Instruction(op, args, {}, out, (), (values.local_shape(out),), where)


def _sliced(values: Values, id_: int, shard: Shard, coarse: Shard | None, out: int, where: str) -> list[Instruction]:
    """The part `shard` of a value that is whole along its dim, or split as `coarse`."""
    if coarse is None:
        begins, ends = offsets(shard.sizes), offsets(shard.sizes, ends=True)
    else:
        begins, ends = within(shard.sizes, coarse.sizes), within(shard.sizes, coarse.sizes, ends=True)
    bounds = per_rank(shard.axes, begins), per_rank(shard.axes, ends)
    return _for_each_block(values, id_, str(aten.slice.Tensor), bounds, shard, out, where)


def _for_each_block(
    values: Values, id_: int, op: str, args: tuple[Any, ...], shard: Shard, out: int, where: str
) -> list[Instruction]:
    """`out` = op(value `id_`, dim, *args) within every block of the dim of `shard`: blocks are a dim meanwhile."""
    type_, d = values.type(id_), shard.dim
    if shard.blocks == 1:
        return [_instruction(values, op, (Ref(id_), d, *args), out, where)]
    spread = TensorType(
        (*type_.shape[:d], shard.blocks, type_.shape[d] // shard.blocks, *type_.shape[d + 1 :]), type_.dtype
    )
    before = values.new(spread, _blocks_apart(values.placement(id_), d))
    after = values.new(spread, _blocks_apart(values.placement(out), d))
    reshape = str(aten.reshape.default)
    return [
        _instruction(values, reshape, (Ref(id_), values.local_shape(before)), before, where),
        _instruction(values, op, (Ref(before), d + 1, *args), after, where),
        _instruction(values, reshape, (Ref(after), values.local_shape(out)), out, where),
    ]


def _blocks_apart(placement: Placement, d: int) -> Placement:
    """`placement` where the blocks of dim `d` have become a dim of their own, before it."""
    shards = (replace(s, dim=s.dim + (s.dim >= d), blocks=1 if s.dim == d else s.blocks) for s in placement.shards)
    return replace(placement, shards=tuple(shards))
