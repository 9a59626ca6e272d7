"""Buffers: tensors that lie on the devices, and how many bytes of them there are.

In: uploads and the outputs of runs. Out: what scripts hold on to; bytes on the fullest device, stage by stage.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from threading import Lock

from moai.graph.placement import TIME, Mesh, Placement
from moai.graph.step_graph import TensorType
from moai.lower.program import Program, Slot

# A buffer that is gone: its id, and what it took.
Freed = tuple[int, "Taken"]
# Bytes on the device that has most, and on which stages (() stands for all).
Taken = tuple[int, tuple[int, ...]]


class Buffer:
    """A tensor that lies on the devices. Dropping the last reference frees it there.

    `mesh` is that of the devices, without "micro": buffers outlive the passes of a loop. `_fits` is the last input of a
    program that it was found to fit.
    """

    __slots__ = ("__weakref__", "_fits", "_frees", "_id", "mesh", "placement", "type")

    def __init__(self, id: int, type: TensorType, placement: Placement, mesh: Mesh, frees: deque[Freed]) -> None:
        self.type = type
        self.placement = placement
        self.mesh = mesh
        self._id: int | None = id
        self._frees = frees
        self._fits: Slot | None = None

    def __repr__(self) -> str:
        return f"Buffer({self.type}@{self.placement} on mesh ({self.mesh}){', donated' if self._id is None else ''})"

    def __del__(self) -> None:
        if self._id is not None:
            self._frees.append((self._id, taken(self)))


def taken(x: Buffer | Slot) -> Taken:
    """What `x` takes."""
    shape = list(x.type.shape)
    for shard in x.placement.shards:  # over different axes: one device has the longest part of every dim
        shape[shard.dim] = max(shard.sizes) * shard.blocks
    return TensorType(tuple(shape), x.type.dtype).nbytes, x.placement.stages


def in_space(mesh: Mesh) -> Mesh:
    """The mesh of the devices alone."""
    return Mesh(tuple((name, size) for name, size in mesh.axes if name != TIME))


class Resident:
    """Bytes of live buffers, on the fullest device of each stage. May be used by several threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._of: Counter[tuple[int, ...]] = Counter()

    def add(self, what: Iterable[Taken], sign: int = 1) -> None:
        """Count `what`, or no more (-1)."""
        with self._lock:
            for nbytes, stages in what:
                self._of[stages] += sign * nbytes

    def on(self, stage: int) -> int:
        """Bytes on a stage's fullest device."""
        with self._lock:
            return sum(nbytes for stages, nbytes in self._of.items() if not stages or stage in stages)

    def most(self) -> int:
        """Bytes on the fullest device of all."""
        with self._lock:
            stages = {0, *(stage for found in self._of for stage in found)}
        return max(map(self.on, stages))


def growth(program: Program) -> list[Taken]:
    """What a run of `program` adds to what is resident; a negative number is what it takes away."""
    found: Counter[tuple[int, ...]] = Counter()
    for slot in program.outputs:
        nbytes, stages = taken(slot)
        found[stages] += nbytes
    for slot in program.inputs:
        if slot.donated:
            nbytes, stages = taken(slot)
            found[stages] -= nbytes
    return [(nbytes, stages) for stages, nbytes in found.items()]
