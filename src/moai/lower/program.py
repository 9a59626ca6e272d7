"""Program: what every device of an accelerator executes for one StepGraph. Plain data, picklable, printable.

In: emitted by `lower`. Out: shipped to and run by `runtime`.

A Program is the same object on every device (SPMD). Numbers that depend on where a device is in the mesh, or on the
pass of the loop, are `PerRank`, and are resolved when the program is loaded. Where the mesh has stages, the devices of
each run a program of their own (`stages`, `of`), of which the same holds.

Instructions name operators by their qualified name: "aten.mm.default" and "moai.sdpa.default" are torch operators
(`moai.graph.ops` defines the `moai` ones); names without a dot are the runtime's own, listed below.
Instructions may mutate: in-place variants stand where the old value is dead. `frees` lists values whose last use it is.

Collectives go over mesh axes, named in `axes` (a tuple, never with "micro"): a device's peers are those that differ
from it on these axes alone, in the order of `Mesh.index(axes, ...)`. All peers issue them in program order. x is a Ref,
xs a tuple of Refs of one dtype; dim, sizes and blocks are those of the Shard (over `axes`) that is gathered or made.

    all_reduce(x, axes, kind)                           kind "sum" or "max"; a fresh tensor
    all_gather(x, axes, dim, sizes, blocks)             the peers' parts joined; a fresh tensor
    reduce_scatter(x, axes, dim, sizes, blocks)         this device's part of the sum; a fresh tensor
    all_reduce_start(xs, axes)                -> handle the xs are summed together in the background
    all_gather_start(xs, axes, cuts)          -> handle cuts: one (dim, sizes, blocks) for each of the xs
    reduce_scatter_start(xs, axes, cuts)      -> handle
    wait(handle)                              -> tuple of results, in the order of the start's xs
    bucket(shapes, dtype)                     -> tuple of tensors, one behind the other in fresh memory
    all_reduce_start(xs, axes, in_place=True) -> handle the xs are all tensors of a bucket, and become the sums; nobody
                                                 touches them before the wait, which returns an empty tuple

Messages between stages, from a device to the one with the same coordinates but for "pp". xs are of one dtype. `nth`
counts all messages that `stage` sends to this one in a run, in the order in which it sends them.

    send(xs, stage)                              in the background: the xs may be freed or overwritten at once
    receive(stage, nth, shapes, dtype)        -> tuple of tensors in fresh memory; waits for them

The loop over micro-batches. The instructions between repeat and its end_repeat run `mesh.steps` times; what a pass
defines is gone after it, but for what the instructions below hand on. There are no loops inside of loops. In a
pipeline, a pass may have several parts, which are done for one micro-batch after another, but not in one go: what a
part defines is gone after it, and it is by lists that it hands things on. `order`, of (part, pass), says when which
part of which pass is run; without it, passes are run whole, one after the other.

    repeat() or repeat(order)
    begin_part()                                 a part goes on to the next one, or to the end; the first comes at once
    end_repeat()                                 what it frees is let go of behind the last pass
    accumulate(x, owned)                      -> total: x in the first pass, then x is added to it in place. `owned`:
                                                 the memory of x is nobody else's, so the first pass may keep x itself
    collect(x)                                -> list of every pass's x (its memory is not copied: nobody overwrites
                                                 what shares memory with x)
    take(list)                                -> in a later part or loop: this pass's entry, which leaves the list
    join(list, dim)                           -> behind the loop: the entries concatenated; the list is gone
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from moai.graph.made_quickly import made_quickly
from moai.graph.placement import Mesh, Placement
from moai.graph.step_graph import TensorType


@dataclass(frozen=True, slots=True)
class PerRank:
    """One number for each coordinate over `axes` (`Mesh.index`)."""

    axes: tuple[str, ...]
    values: tuple[int, ...]

    def __repr__(self) -> str:
        return f"<{','.join(self.axes)}: {'|'.join(map(str, self.values))}>"


class _Room:
    """For what is worked out of an instruction (`cleanup.uses`), and no part of it."""

    __slots__ = ("remembered_uses",)
    remembered_uses: tuple[int, ...]


@made_quickly
@dataclass(frozen=True, slots=True)
class Instruction(_Room):
    """`outs` as in StepGraph.Node: an id, None, or a tuple of those. `shapes` are the local shapes of the flat outputs
    (entries may be PerRank), checked when a program runs for the first time; empty where nothing is to check."""

    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: Any
    frees: tuple[int, ...] = ()
    shapes: tuple[tuple[Any, ...], ...] = ()
    where: str = ""


@made_quickly
@dataclass(frozen=True, slots=True)
class Slot:
    """A buffer that enters or leaves a program: value id, global type, how it lies on the devices (never split over
    "micro").

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
    """`name` is unique in a process and short.

    `peak_bytes` is the predicted peak of one device (the largest over devices) for everything the program touches: its
    inputs, temporaries and outputs; `resident_bytes` is the part of it that are inputs.

    `stages`: what the devices of each stage of a pipeline run; `instructions` are empty then. The inputs and outputs of
    a stage are some of the whole's, with the same ids: those whose placements name the stage.
    """

    name: str
    mesh: Mesh
    inputs: tuple[Slot, ...]
    outputs: tuple[Slot, ...]
    n_scalars: int
    instructions: tuple[Instruction, ...]
    peak_bytes: int
    resident_bytes: int
    notes: tuple[str, ...] = ()
    stages: tuple[Program, ...] = ()

    def of(self, stage: int) -> Program:
        """What the devices of `stage` run."""
        return replace(self.stages[stage], name=self.name) if self.stages else self

    def __str__(self) -> str:
        if self.stages:
            return "\n".join(f"stage {s}: {self.of(s)}" for s in range(len(self.stages)))
        head = f"program {self.name} on mesh ({self.mesh}), peak {self.peak_bytes / 2**20:.1f} MiB"
        ins = ", ".join(f"%{s.id}:{s.type}@{s.placement}" for s in self.inputs)
        outs = ", ".join(f"%{s.id}:{s.type}@{s.placement}" for s in self.outputs)
        body = "\n".join(f"  {i.outs} = {i.op}({i.args}, {i.kwargs})  free {i.frees}" for i in self.instructions)
        return f"{head}\ninputs {ins}\n{body}\noutputs {outs}"
