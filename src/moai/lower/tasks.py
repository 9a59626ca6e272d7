"""What the instructions of a program cost a device: calculations, bytes moved, messages.

In: a program, and what is known of its values. Out: `Task`s in execution order. The device is the first one, which has
the largest parts. How long a task takes is for `plan` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moai.graph.step_graph import Phase, Ref, TensorType, flat_ids, refs
from moai.lower.cleanup import uses
from moai.lower.on_meta import named_arguments, only_written, written
from moai.lower.operators import BUILTINS, COLLECTIVES, STARTS, is_view
from moai.lower.program import Instruction, PerRank, Program
from moai.lower.regions import Region, regions
from moai.lower.stages.weights import awaited_by_none
from moai.lower.values import local_lengths
from moai.plan.work import AXES, OPERATORS, Task

_PRECISIONS = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "fp8",
    torch.float8_e5m2: "fp8",
}
# They touch those rows of their first argument only that the others name.
_LOOKUPS = frozenset({"embedding", "gather", "index", "index_select", "class_loss", "nll_loss_forward"})
_EMBEDDINGS = frozenset({"embedding", "embedding_backward", "embedding_dense_backward"})

_BACKWARD = ("backward", "recomputed")
_HANDED_ON = frozenset({"accumulate", "collect", "take"})

Shape = tuple[int, ...]


def tasks(program: Program, types: Mapping[int, TensorType], phases: Mapping[int, str], fused: bool) -> list[Task]:
    """`phases`: of values, by id, "recomputed" among them. `fused`: whether regions are compiled, so that what is made
    and used within one moves no bytes. What the optimizer's first step makes out of nothing, its states, is left out:
    all later steps find it."""
    return _Reader(program, types, phases, fused).tasks


def tasks_at(
    program: Program, types: Mapping[int, TensorType], phases: Mapping[int, str]
) -> tuple[list[Task], list[int | None]]:
    """The tasks, and for each instruction the position of the one that its time is a part of: its own, or else that of
    the next instruction that has one, for which it gets things ready. None for what is left out."""
    reader = _Reader(program, types, phases, fused=False)
    last = len(reader.tasks) - 1
    return reader.tasks, [None if at is None or last < 0 else min(at, last) for at in reader.at]


def bounds(program: Program, phases: Mapping[int, str]) -> tuple[int, int]:
    """Where the backward begins, and where the optimizer does; the end of the program where there is none.

    What writes in place makes no value that would tell. So the backward goes from the first value that is made in it to
    the last. What needs no other value is made before a loop, and tells nothing.
    """
    code = program.instructions
    begin = max((at for at, each in enumerate(code) if each.op == "repeat"), default=0)
    backward = [
        at
        for at, each in enumerate(code)
        if at >= begin and each.op not in BUILTINS and uses(each) and _made_in_backward(each, phases)
    ]
    return (backward[0], backward[-1] + 1) if backward else (len(code), len(code))


def _made_in_backward(instruction: Instruction, phases: Mapping[int, str]) -> bool:
    return any(phases.get(out) in _BACKWARD for out in flat_ids(instruction.outs))


def shapes_of(program: Program) -> dict[int, Shape]:
    """The shape of every value on the first device, in the first pass of a loop."""
    mesh = program.mesh
    first = mesh.coordinates(0, 0)

    def here(shape: Sequence[Any]) -> Shape:
        return tuple([n.values[mesh.index(n.axes, first)] if isinstance(n, PerRank) else n for n in shape])

    found = {slot.id: here(local_lengths(slot.type.shape, slot.placement)) for slot in program.inputs}
    for each in program.instructions:
        if each.op == "bucket":
            found.update(zip(each.outs, map(here, each.args[0]), strict=True))
        elif each.op in _HANDED_ON:
            found[each.outs] = found[each.args[0].id]
        elif each.shapes:
            found.update(zip(flat_ids(each.outs), map(here, each.shapes), strict=True))
    return found


def bytes_by(shapes: Mapping[int, Shape], types: Mapping[int, TensorType]) -> Callable[[int], int]:
    """The bytes of values of these shapes; 0 for what is no tensor."""

    def nbytes(id_: int) -> int:
        type_ = types.get(id_)
        return 0 if type_ is None else math.prod(shapes.get(id_, type_.shape)) * type_.dtype.itemsize

    return nbytes


class _Reader:
    def __init__(
        self, program: Program, types: Mapping[int, TensorType], phases: Mapping[int, str], fused: bool
    ) -> None:
        self._mesh, self._types, self._phases = program.mesh, types, phases
        self._shapes = shapes_of(program)
        self._bytes = bytes_by(self._shapes, types)
        self._starts: dict[int, int] = {}  # by a message's handle, the position of its task
        self._looped, self._recomputed, self._is_late = False, False, False
        self._phase: Phase = "forward"
        self.tasks: list[Task] = []
        self.at: list[int | None] = []  # for each instruction, the position of its task; there may be none behind
        self._late = set(map(id, awaited_by_none(program, self._bytes)))
        backward, optimizer = bounds(program, phases)
        by_start = {region.start: region for region in regions(program)} if fused else {}
        end = 0
        for at, instruction in enumerate(program.instructions):
            self._phase = "optimizer" if at >= optimizer else "backward" if at >= backward else "forward"
            made = flat_ids(instruction.outs)
            if made and made[0] in phases:
                self._recomputed = phases[made[0]] == "recomputed"
            self.at.append(len(self.tasks))
            self._is_late = id(instruction) in self._late
            if at in by_start:
                end = by_start[at].stop
                self._add(self._region(by_start[at], program.instructions))
            elif at >= end:
                self._instruction(instruction)

    def _add(self, task: Task) -> None:
        backward = self._phase == "backward"
        recomputed, late = self._recomputed and backward, self._is_late and backward
        self.tasks.append(task._replace(phase=self._phase, looped=self._looped, recomputed=recomputed, late=late))

    # -- tasks

    def _instruction(self, instruction: Instruction) -> None:
        op = instruction.op
        if op in COLLECTIVES:
            if op in STARTS:
                self._starts[instruction.outs] = len(self.tasks)
            self._add(self._message(instruction))
        elif op == "wait":
            self.at[-1] = at = self._starts.pop(instruction.args[0].id)
            self.tasks[at] = self.tasks[at]._replace(until=len(self.tasks) - at)
        elif op in ("repeat", "end_repeat"):
            self._looped = op == "repeat"
        elif op in ("accumulate", "join"):
            self._add(Task("stream", "forward", bytes=3.0 * self._bytes(instruction.args[0].id)))
        elif self._is_new_state(instruction):
            self.at[-1] = None
        elif op not in BUILTINS and not is_view(op):
            self._add(self._computed(instruction))

    def _is_new_state(self, instruction: Instruction) -> bool:
        """Whether it makes something out of nothing for the optimizer."""
        if instruction.op in BUILTINS or uses(instruction):
            return False
        return any(self._phases.get(out) == "optimizer" for out in flat_ids(instruction.outs))

    def _message(self, instruction: Instruction) -> Task:
        xs, axes = instruction.args[:2]
        kind = instruction.op.removesuffix("_start")
        given = [xs] if isinstance(xs, Ref) else list(xs)
        nbytes = sum(self._bytes(x.id) for x in given)
        if kind == "all_gather":
            nbytes *= self._mesh.count(axes)
        # A message over several axes is a small one, and the outer axis has the slower links.
        axis = axes[0] if len(axes) == 1 and axes[0] in AXES else "dp"
        return Task(kind, "forward", self._precision(given[0].id), message=float(nbytes), axis=axis)

    def _region(self, region: Region, code: Sequence[Instruction]) -> Task:
        touched = {i for each in region.of(code) for i in written(each)}
        given = sum(self._bytes(i) * (2 if i in touched else 1) for i in region.inputs)
        made = sum(self._bytes(i) for i in region.outputs)
        precision = self._precision(next(iter((*region.outputs, *region.inputs)), -1))
        return Task("stream", "forward", precision, bytes=float(given + made))

    def _computed(self, instruction: Instruction) -> Task:
        packet = instruction.op.split(".")[1].removesuffix("_")
        given = [r.id for r in refs((instruction.args, instruction.kwargs))]
        made = flat_ids(instruction.outs)
        precision = self._precision(next((i for i in (*given, *made) if self._is_float(i)), -1))
        nbytes = float(self._moved(packet, instruction, given, made))
        op = packet if packet in OPERATORS else ""
        task = Task("stream", "forward", precision, bytes=nbytes, first=packet in _EMBEDDINGS, op=op)
        product = _PRODUCTS.get(packet)
        if product is not None:
            m, n, k, batch = product(
                [self._shape(x) for _, x in named_arguments(instruction)], self._result(instruction)
            )
            return task._replace(kind="matmul", flops=2.0 * batch * m * n * k, m=float(m), n=float(n), k=float(k))
        if packet in ("sdpa", "sdpa_backward"):
            return task._replace(kind="attention", flops=self._attention(packet, instruction))
        return task

    def _attention(self, packet: str, instruction: Instruction) -> float:
        """Two products forward, and five backward, which computes scores again; a causal mask leaves half of each."""
        named = dict(named_arguments(instruction))
        q, k, v = (self._shapes[named[name].id] for name in ("q", "k", "v"))
        scores = math.prod(q[:-1]) * k[-2]
        forward = 2.0 * scores * (q[-1] + v[-1])
        return forward * (1.0 if packet == "sdpa" else 2.5) * (0.5 if named["is_causal"] else 1.0)

    def _result(self, instruction: Instruction) -> Shape:
        made = flat_ids(instruction.outs) or written(instruction)
        return self._shapes[made[0]]

    # -- tensors

    def _moved(self, packet: str, instruction: Instruction, given: Sequence[int], made: Sequence[int]) -> int:
        """Everything that is given is read, and everything that is made or overwritten is written."""
        results = sum(map(self._bytes, made))
        if packet in _LOOKUPS:
            return 2 * results + sum(map(self._bytes, given[1:]))
        unread = only_written(instruction)
        over = written(instruction)
        return results + sum(map(self._bytes, over)) + sum(self._bytes(i) for i in given if i not in unread)

    def _shape(self, argument: Any) -> Any:
        return self._shapes[argument.id] if isinstance(argument, Ref) else argument

    def _is_float(self, id_: int) -> bool:
        return id_ in self._types and self._types[id_].dtype in _PRECISIONS

    def _precision(self, id_: int) -> str:
        type_ = self._types.get(id_)
        return "fp32" if type_ is None else _PRECISIONS.get(type_.dtype, "fp32")


# (m, n, k, batch) of products, from the arguments (tensors as their shapes) and the result's shape.


def _plain(a: Shape, out: Shape) -> tuple[float, ...]:
    return out[-2], out[-1], a[-1], math.prod(out[:-2])


def _convolution(args: Sequence[Any], out: Shape) -> tuple[float, ...]:
    weight, transposed = args[1], args[6]
    if transposed:
        x = args[0]
        return x[0] * math.prod(x[2:]), math.prod(weight[1:]), weight[0], 1
    return out[0] * math.prod(out[2:]), out[1], math.prod(weight[1:]), 1


def _convolution_backward(args: Sequence[Any], _: Shape) -> tuple[float, ...]:
    grad, weight, wanted = args[0], args[2], args[10]
    return grad[0] * math.prod(grad[2:]), grad[1], math.prod(weight[1:]), sum(map(bool, wanted[:2]))


_PRODUCTS: dict[str, Callable[[Sequence[Any], Shape], tuple[float, ...]]] = {
    "mm": lambda args, out: _plain(args[0], out),
    "bmm": lambda args, out: _plain(args[0], out),
    "matmul": lambda args, out: _plain(args[0], out),
    "addmm": lambda args, out: _plain(args[1], out),
    "baddbmm": lambda args, out: _plain(args[1], out),
    "_grouped_mm": lambda args, out: (*out[-2:], args[0][-1], args[0][0] if len(args[0]) == 3 else 1),
    "rows_mm": lambda args, out: (*out, args[0][-1], 1),
    "rows_outer": lambda args, out: (*out[-2:], args[0][0], 1),
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
}
