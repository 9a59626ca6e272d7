"""Stopwatch: how long devices take for instructions, when all of them work at the same time.

In: a Case (tensors, and instructions over them), or a whole Program. Out: seconds, of the slowest device by its own
clock. Cases run as any Program does, in a loop that lasts long enough to be timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moai.graph.placement import REPLICATE, TIME, Mesh
from moai.graph.step_graph import TensorType, flat_ids
from moai.lower.program import Instruction, Program, Slot
from moai.runtime.accelerator import Accelerator
from moai.runtime.buffers import Buffer

# That a timed run should take: less than the system lets another program run for, so that some runs are undisturbed.
SECONDS = 0.003
RUNS = 12
_FEW = 3  # runs at least of what takes longer
_LEAST = 1e-7  # seconds that anything takes
_MOST_PASSES = 4096

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Case:
    """`body` is repeated; value i is tensor i of `tensors`, which every device has a copy of. `axes`: of the mesh,
    outermost first; empty for one axis of all devices. `parts`: how many times the body does what is to be timed.
    `beside`: what else it does, and is not to be counted."""

    tensors: tuple[torch.Tensor, ...]
    body: tuple[Instruction, ...]
    axes: tuple[tuple[str, int], ...] = ()
    parts: int = 1
    beside: Case | None = None


class Stopwatch:
    """See the module docstring. What counts is each device's fastest of `runs` runs of `seconds` each, or of fewer
    where one takes longer: whatever else the machine does only adds to it."""

    def __init__(self, accelerator: Accelerator, seconds: float = SECONDS, runs: int = RUNS) -> None:
        self._accelerator = accelerator
        self._seconds = seconds
        self._runs = runs

    def of_case(self, case: Case) -> float:
        """Seconds of one part of the body."""
        beside = 0.0 if case.beside is None else self._of_pass(case.beside)
        return max(_LEAST, self._of_pass(case) - beside) / case.parts

    def _of_pass(self, case: Case) -> float:
        mesh = _mesh(case, self._accelerator.n_devices, 1)
        buffers = [self._accelerator.upload(x, REPLICATE, mesh) for x in case.tensors]
        try:
            single = self._program(case, 1)
            once = self._least(single, buffers, 2)  # the first run is checked, and slower
            if once > self._seconds / 2:
                return self._least(single, buffers, min(self._runs, max(_FEW, int(self._runs * self._seconds / once))))
            passes = min(_MOST_PASSES, max(2, int(self._seconds / once)))
            return self._least(self._program(case, passes), buffers, 1 + self._runs) / passes
        finally:
            self._accelerator.forget()

    def of_program(
        self,
        program: Program,
        scalars: Sequence[float | int] = (),
        tensors: Sequence[torch.Tensor] | None = None,
    ) -> float:
        """Seconds of a run of `program`: of a layer, a step, whatever it is. Inputs that are left out are zeros, and
        scalars are ones: with small ones, optimizers multiply weights by them run after run, until these are so close
        to zero that a processor takes much longer for them."""
        given = tensors or [torch.zeros(s.type.shape, dtype=s.type.dtype, device="cpu") for s in program.inputs]
        return _slowest([self._accelerator.run_seconds for _ in self._runs_of(program, scalars, given)])

    def of_instructions(self, program: Program, tensors: Sequence[torch.Tensor]) -> list[tuple[float, ...]]:
        """Seconds of each instruction on each device, in the run that was the fastest as a whole: the sum is what a run
        takes, which the fastest times of all instructions would not add up to."""
        runs = [self._accelerator.instruction_seconds for _ in self._runs_of(program, (), tensors, timed=True)]
        return min(runs, key=lambda devices: max(map(sum, devices)))

    def _runs_of(
        self,
        program: Program,
        scalars: Sequence[float | int],
        tensors: Sequence[torch.Tensor],
        timed: bool = False,
    ) -> Iterator[None]:
        """Yields when each run is over."""
        accelerator, slots = self._accelerator, program.inputs
        replaced = {slot.replaces for slot in program.outputs}
        consumed = [i for i, slot in enumerate(slots) if slot.donated and i not in replaced]
        inputs = [accelerator.upload(x, s.placement, program.mesh) for x, s in zip(tensors, slots, strict=True)]
        for number in range(1 + self._runs):
            outputs = accelerator.run(program, inputs, scalars or [1] * program.n_scalars, timed)
            accelerator.synchronize()
            if number:  # the first run is checked, and slower
                yield
            for slot, buffer in zip(program.outputs, outputs, strict=True):
                if slot.replaces is not None:
                    inputs[slot.replaces] = buffer
            for i in consumed:
                inputs[i] = accelerator.upload(tensors[i], slots[i].placement, program.mesh)

    def _program(self, case: Case, passes: int) -> Program:
        mesh = _mesh(case, self._accelerator.n_devices, passes)
        slots = tuple(Slot(i, TensorType(tuple(x.shape), x.dtype), REPLICATE) for i, x in enumerate(case.tensors))
        loop = (Instruction("repeat", (), {}, None), *case.body, Instruction("end_repeat", (), {}, None))
        return Program(f"profile{next(_numbers)}", mesh, slots, (), 0, loop, 0, 0)

    def _least(self, program: Program, buffers: Sequence[Buffer], runs: int) -> float:
        found = []
        for _ in range(runs):
            self._accelerator.run(program, buffers, ())
            self._accelerator.synchronize()
            found.append(self._accelerator.run_seconds)
        return _slowest(found)


def _slowest(runs: Sequence[Sequence[float]]) -> float:
    """Seconds of the slowest device in its fastest run; `runs` has each one's devices."""
    return max(map(min, zip(*runs, strict=True)))


def _mesh(case: Case, n_devices: int, passes: int) -> Mesh:
    return Mesh((*(case.axes or (("dp", n_devices),)), (TIME, passes)))


def calls(n_tensors: int, *instructions: Instruction) -> tuple[Instruction, ...]:
    """`instructions` that name their results by the ids from `n_tensors` on, each freed behind the last one."""
    made = [i for each in instructions for i in flat_ids(each.outs)]
    *others, last = instructions
    assert all(i >= n_tensors for i in made)
    return (*others, Instruction(last.op, last.args, last.kwargs, last.outs, tuple(made), last.shapes, last.where))
