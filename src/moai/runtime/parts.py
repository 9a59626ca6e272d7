"""Parts: the entries of a tensor that lie at a coordinate of a mesh, as a view of it; terms of a sum.

In: the whole tensor. Out: a view of the part's entries in the part's order, to be read or written. Where a shard has
several blocks its dim appears as two, [blocks, length in each]: joining them would take a copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from moai.graph.placement import STAGES, Mesh, Placement, Shard

HALVES = frozenset({torch.float16, torch.bfloat16})


def check_split(x: torch.Tensor, shard: Shard, mesh: Mesh) -> None:
    """ValueError if `x` cannot be split so."""
    fits = shard.dim < x.dim() and x.shape[shard.dim] == sum(shard.sizes) * shard.blocks
    if not fits or len(shard.sizes) != mesh.count(shard.axes):
        raise ValueError(
            f"a tensor of shape {list(x.shape)} cannot be split along dim {shard.dim} over {', '.join(shard.axes)}"
            f" of mesh ({mesh}) in {shard.blocks} block(s) of parts of {shard.sizes}"
        )


def cut(x: torch.Tensor, dim: int, sizes: Sequence[int], blocks: int, index: int) -> torch.Tensor:
    """Part `index` of a split of `dim` as in `Shard`."""
    assert x.shape[dim] == sum(sizes) * blocks, (x.shape, dim, sizes, blocks)
    start = sum(sizes[:index])
    if blocks == 1:
        return x.narrow(dim, start, sizes[index])
    return x.unflatten(dim, (blocks, sum(sizes))).narrow(dim + 1, start, sizes[index])


def part_at(x: torch.Tensor, placement: Placement, mesh: Mesh, at: Mapping[str, int]) -> torch.Tensor:
    """What lies at coordinate `at`."""
    for shard in reversed(placement.shards):  # the last dim first: a dim that becomes two moves those behind it
        x = cut(x, shard.dim, shard.sizes, shard.blocks, mesh.index(shard.axes, at))
    return x


def holders(placement: Placement, mesh: Mesh) -> list[list[int]]:
    """For every part, once: the devices whose tensors add up to it. That is one device where nothing is partial."""
    found: dict[int, list[int]] = {}
    told_apart = (*placement.split_axes, *placement.partial)
    first = placement.stages[0] if placement.stages else 0
    for rank in range(mesh.n_devices):
        at = mesh.coordinates(rank)
        if at.pop(STAGES, first) == first and all(at[axis] == 0 or axis in told_apart for axis in at):
            found.setdefault(mesh.index(placement.split_axes, at), []).append(rank)
    return list(found.values())


def total(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    """The sum, in fresh memory. Halves are added up in float32 and rounded once."""
    dtype = terms[0].dtype
    found = terms[0].to(torch.float32 if dtype in HALVES else dtype, copy=True)
    for term in terms[1:]:
        found.add_(term)
    return found.to(dtype)
