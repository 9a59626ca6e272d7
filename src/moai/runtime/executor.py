"""Executor: one device's way through a Program.

In: a Program, the device's rank, the other devices; then, at each run, local tensors and scalars. Out: local tensors.

The first run is interpreted and checked, shape by shape; later runs are one generated function, in which compiled code
stands for regions once there is any (`compiled`). Either way an
instruction that fails is named.
"""

from __future__ import annotations

import linecache
import time
from collections.abc import Callable, Mapping, Sequence
from types import CodeType, FrameType
from typing import Any

import torch

from moai.graph.ops import random_rows
from moai.graph.placement import STAGES, Mesh, local_shape
from moai.graph.step_graph import Ref, Scalar, flat_ids, map_args, refs
from moai.lower.operators import BOUNDS, MESSAGES
from moai.lower.program import Instruction, PerRank, Program, Slot
from moai.runtime import codegen, collectives, loops
from moai.runtime.clock import Clock
from moai.runtime.codegen import Call, PerPass
from moai.runtime.collectives import Network, Partner, Peers
from moai.runtime.compiled import Policy, ProgramRegions
from moai.runtime.inbox import Inbox, inboxes
from moai.runtime.inductor import Compiler


class InstructionError(RuntimeError):
    """An instruction failed. `in_collective`: it was waiting for other devices, so the cause may be on one of them."""

    def __init__(self, text: str, in_collective: bool) -> None:
        super().__init__(text)
        self.in_collective = in_collective


class Executor:
    """See the module docstring. Not thread-safe but for `position`."""

    def __init__(
        self,
        program: Program,
        rank: int,
        device: torch.device,
        network: Network | None,
        compiler: Compiler | None = None,
        compile: Policy = "auto",
        clock: Clock | None = None,
    ) -> None:
        """Meets the peers of the program's collectives; `network` is None for an accelerator of one device, `compiler`
        where nothing is ever compiled. `clock`, only there, times the instructions of each run but
        the first.

        Raises RuntimeError for an operator that this PyTorch does not have, InstructionError if peers are gone.
        """
        self.program = program
        self._clock = clock
        self._place = _Place(program.mesh, rank)
        binding = _Binding(program, self._place, device, network)
        self._inboxes = binding.inboxes
        self._calls = binding.calls()
        self._carried = loops.carried(program)
        self._network = network if any(i.op in MESSAGES for i in program.instructions) else None
        self._regions = ProgramRegions(program, self._calls, compiler, compile) if compiler else None
        self._function, self._code = self._generated({})
        self._checked = False
        self._checking: int | None = None
        donated = {slot.id for slot in program.inputs if slot.donated}
        self._kept = [i for i, slot in enumerate(program.inputs) if not slot.donated]
        self._in_place = [i for i, slot in enumerate(program.outputs) if slot.id in donated]
        self._fresh = [i for i, slot in enumerate(program.outputs) if slot.id not in donated]

    @torch.no_grad()
    def run(self, inputs: list[torch.Tensor], scalars: Sequence[float | int]) -> list[torch.Tensor]:
        """The local outputs. Empties `inputs`, so that donated memory is freed as early as the program allows.

        An output owns its memory: it shares none with an input that is kept nor with another output, and is no view of
        something larger. So buffers can be overwritten and freed one by one.
        """
        if not self._checked:
            self._check_slots("input", self.program.inputs, inputs)
        taken = {_address(inputs[i]) for i in self._kept} if self._fresh else set()
        self._exchange(*(inbox.open for inbox in self._inboxes.values()))
        outputs = self._timed_run(inputs, scalars)
        if self._network is not None:  # a run is over when what it sent has arrived
            self._exchange(self._network.settle)
        if self._fresh:
            self._check_slots(
                "output", [self.program.outputs[i] for i in self._fresh], [outputs[i] for i in self._fresh]
            )
            taken.update(_address(outputs[i]) for i in self._in_place)
            _own_memory(outputs, self._fresh, taken)
        return outputs

    def _exchange(self, *beginnings_or_ends: Callable[[], None]) -> None:
        try:
            for each in beginnings_or_ends:
                each()
        except RuntimeError as error:
            raise InstructionError(f"program {self.program.name}: {error}", in_collective=True) from error

    def _timed_run(self, inputs: list[torch.Tensor], scalars: Sequence[float | int]) -> list[torch.Tensor]:
        regions = self._regions
        if regions and (compiled := regions.take()):
            self._function, self._code = self._generated(compiled)
        begin = time.perf_counter()
        if self._checked and not (regions and regions.watching):
            outputs = self._run_generated(inputs, scalars)
        else:
            outputs = self._run_checked(inputs, scalars)
            self._checked = True
        if regions:
            regions.ran(time.perf_counter() - begin)
        return outputs

    def instruction_seconds(self) -> tuple[float, ...]:
        """What each instruction took in the last run, in all passes of a loop; nothing without a clock, and after the
        first run. The device has to be done."""
        seconds = self._clock.seconds() if self._clock else ()
        if not seconds:
            return ()
        found = [0.0] * len(self._calls)
        for (index, _), taken in zip(loops.order(self.program), seconds, strict=True):
            found[index] += taken
        return tuple(found)

    def position(self, frame: FrameType | None) -> int | None:
        """Index of the instruction that a thread, whose innermost frame is given, executes; None outside of a run."""
        if self._checking is not None:
            return self._checking
        while frame is not None:
            if frame.f_code is self._code:
                return self._index(frame.f_lineno)
            frame = frame.f_back
        return None

    def _generated(self, compiled: codegen.Compiled) -> tuple[Callable[..., list[torch.Tensor]], CodeType]:
        tick = self._clock.tick if self._clock else None
        source, namespace = codegen.generate(self.program, self._calls, self._carried, compiled, tick)
        filename = f"<program {self.program.name}>"
        exec(compile(source, filename, "exec"), namespace)
        linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
        return namespace["run"], namespace["run"].__code__

    def _index(self, line: int) -> int | None:
        index = line - codegen.LINES_BEFORE - 1
        return index if 0 <= index < len(self._calls) else None

    def _run_generated(self, inputs: list[torch.Tensor], scalars: Sequence[float | int]) -> list[torch.Tensor]:
        try:
            if self._clock:
                self._clock.start()
            return self._function(inputs, scalars)
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code is not self._code:
                trace = trace.tb_next
            index = self._index(trace.tb_lineno) if trace else None
            if trace is None or index is None:
                raise
            variables = trace.tb_frame.f_locals
            raise self._failed(index, error, lambda ref: variables.get(f"v{ref.id}")) from error

    def _run_checked(self, inputs: list[torch.Tensor], scalars: Sequence[float | int]) -> list[torch.Tensor]:
        values: dict[int, Any] = dict.fromkeys(self._carried)
        values.update(zip((slot.id for slot in self.program.inputs), inputs, strict=True))
        inputs.clear()
        try:
            for index, step in loops.order(self.program):
                self._checking = index
                if self._regions and self._regions.watching:
                    self._regions.meet(index, values)
                self._execute(index, step, values, scalars)
        finally:
            self._checking = None
        return [values[slot.id] for slot in self.program.outputs]

    def _execute(self, index: int, step: int, values: dict[int, Any], scalars: Sequence[float | int]) -> None:
        instruction, call = self.program.instructions[index], self._calls[index]

        def filled(leaf: Any) -> Any:
            if isinstance(leaf, Ref):
                return values[leaf.id]
            if isinstance(leaf, Scalar):
                return scalars[leaf.index]
            return leaf.values[step] if isinstance(leaf, PerPass) else leaf

        if call is not None:
            try:
                result = call.function(*map_args(call.args, filled), **map_args(call.kwargs, filled))
            except Exception as error:
                raise self._failed(index, error, lambda ref: values.get(ref.id)) from error
            _bind_outs(instruction.outs, result, values)
            self._check_shapes(index, step, values)
        for dead in instruction.frees:
            del values[dead]

    def _check_slots(self, kind: str, slots: Sequence[Slot], tensors: Sequence[torch.Tensor]) -> None:
        for slot, x in zip(slots, tensors, strict=True):
            self._check_slot(kind, slot, x)

    def _check_slot(self, kind: str, slot: Slot, x: torch.Tensor) -> None:
        expected = local_shape(slot.type.shape, slot.placement, self.program.mesh, self._place.at)
        if tuple(x.shape) != expected or x.dtype != slot.type.dtype:
            raise RuntimeError(
                f"{kind} %{slot.id} of program {self.program.name} should be {slot.type.dtype} of local shape "
                f"{list(expected)}, but is {x.dtype} {list(x.shape)}: this is a bug of MoAI, please report it"
            )

    def _check_shapes(self, index: int, step: int, values: dict[int, Any]) -> None:
        instruction = self.program.instructions[index]
        for id, shape in zip(flat_ids(instruction.outs), instruction.shapes, strict=False):
            expected = [self._place.in_pass(n, step) for n in shape]
            actual = values[id]
            if isinstance(actual, torch.Tensor) and list(actual.shape) != expected:
                raise InstructionError(
                    f"{self._name(index)} gave %{id} the shape {list(actual.shape)} where {expected} was planned: "
                    "this is a bug of MoAI, please report it",
                    in_collective=False,
                )

    def _name(self, index: int) -> str:
        instruction = self.program.instructions[index]
        where = f", from {instruction.where}" if instruction.where else ""
        return f"operator {instruction.op} (instruction {index} of program {self.program.name}{where})"

    def _failed(self, index: int, error: Exception, value_of: Callable[[Ref], Any]) -> InstructionError:
        call = self._calls[index]
        assert call is not None
        given = ", ".join(_describe(value_of(ref)) for ref in refs((call.args, call.kwargs)))
        return InstructionError(
            f"{self._name(index)} failed on ({given}): {type(error).__name__}: {error}",
            in_collective=self.program.instructions[index].op in collectives.NAMES,
        )


class _Place:
    """Where a device is in the mesh: `PerRank` -> number."""

    def __init__(self, mesh: Mesh, rank: int) -> None:
        self._mesh = mesh
        self._rank = rank
        self.at = mesh.coordinates(rank)

    def in_pass(self, leaf: Any, step: int) -> Any:
        """The number of a `PerRank` in pass `step`; other things are left as they are."""
        if not isinstance(leaf, PerRank):
            return leaf
        return leaf.values[self._mesh.index(leaf.axes, self._mesh.coordinates(self._rank, step))]

    def in_every_pass(self, leaf: Any) -> Any:
        """The same, as `PerPass` where passes differ."""
        if not isinstance(leaf, PerRank):
            return leaf
        numbers = tuple(self.in_pass(leaf, step) for step in range(self._mesh.steps))
        return numbers[0] if len(set(numbers)) == 1 else PerPass(numbers)


class _Binding:
    """Instruction -> `Call`, for one device."""

    def __init__(self, program: Program, place: _Place, device: torch.device, network: Network | None) -> None:
        self._program = program
        self._place = place
        self._device = device
        self._network = network
        others = {i.args[1 if i.op == "send" else 0] for i in program.instructions if i.op in MESSAGES}
        self._partners = {stage: self._partner(stage) for stage in sorted(others)}
        self.inboxes: Mapping[int, Inbox] = inboxes(program, place.in_pass, self._partners)

    def calls(self) -> list[Call | None]:
        """In the order of the instructions; None for the bounds of a loop."""
        return [self._call(i) for i in self._program.instructions]

    def _call(self, instruction: Instruction) -> Call | None:
        op = instruction.op
        if op in BOUNDS:
            return None
        args = map_args(instruction.args, self._place.in_every_pass)
        kwargs = map_args(instruction.kwargs, self._place.in_every_pass)
        if op == "send":
            xs, stage = args
            return Call(self._partners[stage].send, (xs,), kwargs)
        if op == "receive":
            stage, *what = args
            return Call(self.inboxes[stage].receive, tuple(what), kwargs)
        if op == "bucket":
            return Call(collectives.bucket, (*args, self._device), kwargs)
        if op == collectives.WAIT:
            return Call(collectives.wait, args, kwargs)
        if op in collectives.NAMES:
            x, axes, *how = args
            return Call(getattr(self._peers(instruction, axes), op), (x, *how), kwargs)
        if op in loops.CARRYING:
            return Call(getattr(loops, op), (Ref(instruction.outs), *args), kwargs)
        if op in loops.NAMES:
            return Call(getattr(loops, op), args, kwargs)
        if op == "moai.random.default":
            return Call(random_rows, args, {**kwargs, "device": self._device})
        operator = _operator(instruction)
        if op == "moai.randperm.default":
            return Call(lambda *a, **kw: operator(*a, **kw).to(self._device), args, kwargs)
        return _on_device(operator, args, kwargs, self._device)

    def _peers(self, instruction: Instruction, axes: Sequence[str]) -> Peers:
        assert self._network is not None, f"{instruction} on an accelerator of one device"
        try:
            return self._network.over(self._program.mesh, axes)
        except Exception as error:
            raise InstructionError(
                f"program {self._program.name} cannot meet its peers over {', '.join(axes)}: {error}",
                in_collective=True,
            ) from error

    def _partner(self, stage: int) -> Partner:
        assert self._network is not None
        mesh = self._program.mesh
        return self._network.at(mesh.rank({**self._place.at, STAGES: stage}))


def _operator(instruction: Instruction) -> torch._ops.OpOverload:
    found: Any = torch.ops
    try:
        for part in instruction.op.split("."):
            found = getattr(found, part)
    except AttributeError:
        found = None
    if not isinstance(found, torch._ops.OpOverload):
        where = f" (from {instruction.where})" if instruction.where else ""
        raise RuntimeError(f"PyTorch {torch.__version__} has no operator {instruction.op}{where}")
    return found


def _on_device(operator: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], device: Any) -> Call:
    """The call with its `device` argument, if the operator has one, set to the worker's device."""
    for index, argument in enumerate(operator._schema.arguments):
        if argument.name == "device":
            if index < len(args):
                args = (*args[:index], device, *args[index + 1 :])
            else:
                kwargs = {**kwargs, "device": device}
    return Call(operator, args, kwargs)


def _bind_outs(outs: Any, result: Any, values: dict[int, Any]) -> None:
    if isinstance(outs, int):
        values[outs] = result
    elif outs:
        for out, part in zip(outs, result, strict=True):
            _bind_outs(out, part, values)


def _address(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _own_memory(outputs: list[torch.Tensor], fresh: Sequence[int], taken: set[int]) -> None:
    """Copies those of the `fresh` outputs that share memory (see `Executor.run`) with the storages at `taken`."""
    for i in fresh:
        address = _address(outputs[i])
        if (address and address in taken) or outputs[i].untyped_storage().nbytes() != outputs[i].nbytes:
            outputs[i] = outputs[i].clone(memory_format=torch.contiguous_format)
        taken.add(address)


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return type(value).__name__
