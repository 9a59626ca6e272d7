"""Program: what every device of an accelerator executes for one StepGraph. Plain data, picklable, printable.

In: emitted by `lower`. Out: shipped to and run by `runtime`.

A Program is the same object on every device (SPMD). Numbers that differ from device to device are `PerRank`,
and are resolved to the device's own number when the program is loaded.

Instructions name operators by their qualified name: "aten.mm.default" and "moai.sdpa.default" are torch operators
(`moai.graph.ops` defines the `moai` ones); names without a dot are the runtime's own collectives, listed below.
Instructions may mutate: in-place variants stand where the old value is dead. `frees` lists values whose last use it is.

Collectives (x is a Ref; all are issued by every device in program order):
    all_reduce(x)                   -> sum over devices, a fresh tensor
    all_reduce_start(xs)            -> handle; xs (tuple of Refs, one dtype) are reduced together in the background
    wait(handle)                    -> tuple of the sums, in the order and shapes of the start's xs
    all_gather(x, dim, sizes)       -> parts of `sizes` along `dim`, concatenated
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from moai.graph.placement import Placement
from moai.graph.step_graph import TensorType


@dataclass(frozen=True, slots=True)
class PerRank:
    """One number a device."""

    values: tuple[int, ...]

    def __repr__(self) -> str:
        return f"<{'|'.join(map(str, self.values))}>"


@dataclass(frozen=True, slots=True)
class Instruction:
    """`outs` as in StepGraph.Node: an id, None, or a tuple of those. `shapes` are the local shapes of the flat outputs
    (entries may be PerRank), checked when a program runs for the first time; empty where nothing is to check."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    frees: tuple[int, ...] = ()
    shapes: tuple[tuple[Any, ...], ...] = ()
    where: str = ""


@dataclass(frozen=True, slots=True)
class Slot:
    """A buffer that enters or leaves a program: value id, global type, how it lies on the devices.

    For an output, `replaces` is the index of the input buffer that it takes over (the same local tensor, if
    the program wrote in place). For an input, `donated` allows the program to overwrite or free it.
    """

    id: int
    type: TensorType
    placement: Placement
    donated: bool = False
    replaces: int | None = None


@dataclass(frozen=True, slots=True)
class Program:
    """`name` is unique in a process and short; `n_devices` is the size of the mesh axis "dp".

    `peak_bytes` is the predicted peak of one device (the largest over devices) for everything the program touches: its
    inputs, temporaries and outputs; `resident_bytes` is the part of it that are inputs.
    """

    name: str
    n_devices: int
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    n_scalars: int
    instructions: tuple[Instruction, ...]
    peak_bytes: int
    resident_bytes: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        head = f"program {self.name} on {self.n_devices} device(s), peak {self.peak_bytes / 2**20:.1f} MiB"
        ins = ", ".join(f"%{s.id}:{s.type}@{s.placement}" for s in self.inputs)
        outs = ", ".join(f"%{s.id}:{s.type}@{s.placement}" for s in self.outputs)
        body = "\n".join(f"  {i.outs} = {i.op}({i.args}, {i.kwargs})  free {i.frees}" for i in self.instructions)
        return f"{head}\ninputs {ins}\n{body}\noutputs {outs}"
