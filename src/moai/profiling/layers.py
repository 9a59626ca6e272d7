"""Layers: what the tasks of a model take in their place, on the devices at hand.

In: an Accelerator, and the graph of a training step. Out: TimedTasks, for a Profile. What a device sees of a model
depends on the devices that share a layer, the samples that it has at a time, and how states are spread: for each of
these the step runs with few of its layers, and every instruction is timed while it does. So caches are as they are in a
step, and a message is waited for as long as it is there.
"""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import torch

from moai.graph.step_graph import StepGraph
from moai.lower.inputs import global_batch
from moai.lower.program import Program
from moai.lower.sampling import FewLayers, few_layers
from moai.plan.errors import PlanError
from moai.plan.in_place import TimedTask, timed
from moai.plan.plan import Plan, Precision
from moai.plan.space import layouts, variants
from moai.plan.work import MESSAGES
from moai.profiling.stopwatch import Stopwatch
from moai.runtime.accelerator import Accelerator

# All shapes take their turns so many times, of so many runs each: what disturbs one turn spares the others.
ROUNDS = 3
RUNS = 3
# No further turns are begun after so long.
_SECONDS = 60.0
# Of more shapes, so many are run: in between, a task is as much faster or slower as the nearest one.
_MOST = 24


# Seconds of each instruction, by device.
_Devices = Sequence[Sequence[float]]


class LayerMeasurement:
    """`steps`: how many turns there are to take, at the most; `run` takes them."""

    def __init__(
        self, accelerator: Accelerator, graph: StepGraph, precision: Precision | None, watch: Stopwatch | None = None
    ) -> None:
        """RuntimeError where no plan can be run, with few layers, in the devices' memory."""
        self._accelerator = accelerator
        self._watch = watch or Stopwatch(accelerator, runs=RUNS)
        memory_bytes = min(device.memory_bytes for device in accelerator.devices)
        given: list[None] = [None] * len(graph.inputs)
        shapes = list(_shapes(accelerator.n_devices, global_batch(graph, given), precision))
        self._programs = list(_fitting(graph, _spread(shapes), memory_bytes))
        if not self._programs:
            raise RuntimeError("Not even a few layers of this model can be run in the devices' memory, under any plan.")
        self.steps = ROUNDS * len(self._programs)

    def run(self, advance: Callable[[], None] = lambda: None) -> tuple[TimedTask, ...]:
        """Calls `advance` after every step. RuntimeError if a worker fails."""
        begin = time.monotonic()
        fastest = self._turns(advance)
        for _ in range(ROUNDS - 1):
            if time.monotonic() - begin < _SECONDS:
                fastest = [min(pair, key=_slowest) for pair in zip(fastest, self._turns(advance), strict=True)]
        self._accelerator.forget()
        seconds: dict[TimedTask, list[float]] = defaultdict(list)
        for few, devices in zip(self._programs, fastest, strict=True):
            for which, mean in self._of_program(few, devices).items():
                seconds[which].append(mean)
        return tuple(which._replace(seconds=statistics.median(times)) for which, times in seconds.items())

    def _turns(self, advance: Callable[[], None]) -> list[_Devices]:
        """Of each program what its instructions take the devices."""
        found: list[_Devices] = []
        for few in self._programs:
            found.append(self._watch.of_instructions(few.program, made_up(few.program)))
            advance()
        return found

    def _of_program(self, few: FewLayers, devices: _Devices) -> dict[TimedTask, float]:
        """What each task takes, on average over the places where it is, and over devices: they wait for each other, so
        that together they are as fast as the average."""
        taken = [0.0] * len(few.tasks)
        for device in devices:
            for at, seconds in zip(few.at, device, strict=True):
                if at is not None:
                    taken[at] += seconds / len(devices)
        mesh, on_gpus = few.program.mesh, self._accelerator.devices[0].kind == "cuda"
        found: dict[TimedTask, list[float]] = defaultdict(list)
        for task, seconds in zip(few.tasks, taken, strict=True):
            # A GPU sends beside its own instructions, whose times say nothing of it.
            if seconds and not (on_gpus and task.kind in MESSAGES and task.until > 1):
                which = timed(task, 0.0, mesh.sizes.get(task.axis, 1))
                found[which].append(seconds / (mesh.steps if task.looped else 1))
        return {which: statistics.mean(times) for which, times in found.items()}


def _slowest(devices: _Devices) -> float:
    """Seconds of a run."""
    return max(map(sum, devices))


def _shapes(n_devices: int, batch: int, precision: Precision | None) -> Iterator[Plan]:
    """The plans whose devices differ in what they see. What is computed again was computed before."""
    for layout in layouts(n_devices, batch, precision):
        if layout.pp == 1:
            yield from (plan for plan in variants(layout) if plan.recompute == "none")


def _spread(plans: Sequence[Plan]) -> list[Plan]:
    """_MOST of the plans at the most, evenly spread."""
    if len(plans) <= _MOST:
        return list(plans)
    return [plans[round(i * (len(plans) - 1) / (_MOST - 1))] for i in range(_MOST)]


def _fitting(graph: StepGraph, plans: Sequence[Plan], memory_bytes: int) -> Iterator[FewLayers]:
    for plan in plans:
        try:
            found = few_layers(graph, plan)
        except (PlanError, RuntimeError):
            continue
        if found.program.peak_bytes <= memory_bytes:
            yield found


def made_up(program: Program) -> list[torch.Tensor]:
    """Inputs: small numbers above 0, so that no operator meets what would take it another time than usual; whole ones
    are 0, which is a place in every table."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    found = []
    for slot in program.inputs:
        type_ = slot.type
        if type_.dtype.is_floating_point:
            found.append(torch.rand(type_.shape, generator=generator, device="cpu").mul_(0.02).to(type_.dtype))
        else:
            found.append(torch.zeros(type_.shape, dtype=type_.dtype, device="cpu"))
    return found
