"""Random placements, for tests that hold for all of them."""

from __future__ import annotations

import random
from collections.abc import Sequence

from moai.graph.placement import TIME, Mesh, Placement, Shard


def random_placement(shape: Sequence[int], mesh: Mesh, r: random.Random, partial: bool = True) -> Placement:
    """Any way in which a tensor may lie on the devices: parts may be uneven, even empty, and come in blocks."""
    of_dim: dict[int, list[str]] = {}
    terms = []
    for axis in (a for a, _ in mesh.axes if a != TIME):
        kind = r.random()
        if kind < 0.2 and partial:
            terms.append(axis)
        elif kind < 0.75 and shape:
            of_dim.setdefault(r.randrange(len(shape)), []).append(axis)
    shards = (random_shard(shape, dim, axes, mesh, r) for dim, axes in sorted(of_dim.items()))
    return Placement(tuple(shards), tuple(terms))


def random_shard(shape: Sequence[int], dim: int, axes: Sequence[str], mesh: Mesh, r: random.Random) -> Shard:
    """Dim `dim` in parts of any lengths, in as many blocks as may be."""
    blocks = r.choice([b for b in (1, 1, 2, 3) if shape[dim] % b == 0])
    length = shape[dim] // blocks
    cuts = sorted(r.randint(0, length) for _ in range(mesh.count(axes) - 1))
    sizes = (b - a for a, b in zip([0, *cuts], [*cuts, length], strict=True))
    return Shard(dim, tuple(axes), tuple(sizes), blocks)
