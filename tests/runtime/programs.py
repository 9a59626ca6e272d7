"""Short ways to write programs by hand."""

import itertools
from collections.abc import Sequence

import torch

from moai.graph.placement import REPLICATE, Mesh, Placement, Shard
from moai.graph.step_graph import Ref, TensorType
from moai.lower.program import Instruction, PerRank, Program, Slot
from moai.platform.device import Device
from moai.runtime.accelerator import Accelerator
from moai.runtime.buffers import Buffer

_names = itertools.count()


def cpus(n: int) -> list[Device]:
    return [Device("cpu", i, 1 << 30, 1) for i in range(n)]


def f32(*shape: int) -> TensorType:
    return TensorType(shape, torch.float32)


def mesh(**axes: int) -> Mesh:
    """Axes in the order given: `mesh(dp=2, tp=3)`."""
    return Mesh(tuple(axes.items()))


def split(dim: int, sizes: Sequence[int], *axes: str, blocks: int = 1) -> Placement:
    """One dim split over `axes`, over dp if none are named."""
    return Placement((Shard(dim, axes or ("dp",), tuple(sizes), blocks),))


TERMS = Placement((), ("dp",))


def each(*values: int) -> PerRank:
    """A number for every device of a mesh that has but dp."""
    return PerRank(("dp",), values)


def put(a: Accelerator, x: torch.Tensor, placement: Placement = REPLICATE, on: Mesh | None = None) -> Buffer:
    """An upload, over dp if no mesh is given."""
    return a.upload(x, placement, on or mesh(dp=a.n_devices))


def slot(id: int, type: TensorType, placement: Placement = REPLICATE, **kwargs) -> Slot:
    return Slot(id, type, placement, **kwargs)


def op(name: str, *args, outs=None, frees=(), shapes=(), where="", **kwargs) -> Instruction:
    """`kwargs` are the operator's."""
    return Instruction(name, args, kwargs, outs, frees, shapes, where)


def program(
    on: int | Mesh, inputs: list[Slot], outputs: list[Slot], *instructions: Instruction, n_scalars: int = 0
) -> Program:
    """`on`: a mesh, or a number of devices that share the batch."""
    where = mesh(dp=on) if isinstance(on, int) else on
    return Program(f"t{next(_names)}", where, tuple(inputs), tuple(outputs), n_scalars, instructions, 0, 0)


def increment(n: int, type: TensorType, placement: Placement = REPLICATE) -> Program:
    """Adds one, in place, to its donated input."""
    x = slot(0, type, placement, donated=True)
    return program(n, [x], [slot(0, type, placement, replaces=0)], op("aten.add_.Scalar", Ref(0), 1))


def busy_seconds(n: int) -> Program:
    """One matrix product that takes a core several seconds; its input is [4000, 4000]."""
    big = f32(4000, 4000)
    out = slot(2, f32())
    return program(
        n,
        [slot(0, big)],
        [out],
        op("aten.mm.default", Ref(0), Ref(0), outs=1, where="train.py:7"),
        op("aten.sum.default", Ref(1), outs=2, frees=(1,)),
    )
