"""Short ways to write programs by hand."""

import itertools

import torch

from moai.graph.placement import Placement, Replicate
from moai.graph.step_graph import Ref, TensorType
from moai.lower.program import Instruction, Program, Slot
from moai.platform.device import Device

_names = itertools.count()


def cpus(n: int) -> list[Device]:
    return [Device("cpu", i, 1 << 30, 1) for i in range(n)]


def f32(*shape: int) -> TensorType:
    return TensorType(shape, torch.float32)


def slot(id: int, type: TensorType, placement: Placement | None = None, **kwargs) -> Slot:
    return Slot(id, type, placement or Replicate(), **kwargs)


def op(name: str, *args, outs=None, frees=(), shapes=(), where="", **kwargs) -> Instruction:
    """`kwargs` are the operator's."""
    return Instruction(name, args, kwargs, outs, frees, shapes, where)


def program(n: int, inputs: list[Slot], outputs: list[Slot], *instructions: Instruction, n_scalars: int = 0) -> Program:
    return Program(f"t{next(_names)}", n, tuple(inputs), tuple(outputs), n_scalars, instructions, 0, 0)


def increment(n: int, type: TensorType, placement: Placement | None = None) -> Program:
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
