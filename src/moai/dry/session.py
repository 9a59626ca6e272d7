"""The session of a dry run: it has no devices, and stops at the first training step.

In: segments from `capture`. Out: the segments of one training step, as graphs. Nothing is computed: a value that the
script reads is 0, unless it follows from what the script has made on the host.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from moai.capture import provenance
from moai.capture.recorder import Recorder, Segment
from moai.capture.values import Value, record_of
from moai.device import backend, options, owner
from moai.device.storage import maker
from moai.dry.joining import Part, joined
from moai.dry.values import Nowhere, results
from moai.graph.step_graph import StepGraph, has_backward
from moai.plan.options import Options

# What a module brings with it stays readable up to this size: tables that decide what a forward pass does are small.
_READABLE_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Captured:
    """A script's first training step. `graph`: its last forward and backward pass with the optimizer's step, as one
    graph, whether or not the script reads a value between them. `batches`: how many times the step runs forward and
    backward, more than 1 if the script adds up gradients itself. `options`: what it asks for by `torch.moreh.option`.
    """

    graph: StepGraph
    batches: int
    options: Options | None


class DrySession:
    """See the module docstring. `captured` is called with the first training step, in the middle of the script, and
    must not return. `memory_bytes`: of the accelerator that the script is to believe in."""

    def __init__(self, captured: Callable[[Captured], NoReturn], memory_bytes: int) -> None:
        self._captured = captured
        self._memory_bytes = memory_bytes
        self._batches = 0
        self._last: Part | None = None  # of those with a backward pass
        self._values: list[object] = []
        self.recorder: Recorder = _Recorder(maker, self._execute, _fetch, lambda *_: None, lambda: None)
        backend.install(self.recorder)
        register_optimizer_step_pre_hook(lambda *_: self.recorder.optimizer_step_begins())
        register_optimizer_step_post_hook(lambda *_: self.recorder.optimizer_step_ends())
        owner.provide(lambda: self)

    def acquire(self) -> object:
        """Nothing to connect to."""
        return self

    def synchronize(self) -> None:
        """The script waits for the devices."""
        self.recorder.flush()

    def write(self, tensors: Sequence[tuple[torch.Tensor, int]], file: str) -> None:
        """Nothing: there are no values."""

    def memory(self) -> tuple[int, int, int]:
        """Bytes over all devices: used, the most ever used, and all there are."""
        return 0, 0, self._memory_bytes

    def _execute(self, segment: Segment) -> list[Nowhere]:
        graph, values = segment.graph, segment.inputs
        found = results(graph, [v.host if v.host is not None else v.buffer for v in values], segment.scalars)
        part = Part(graph, tuple(id(v.buffer or v.host) for v in values), tuple(map(id, found)))
        if has_backward(graph):
            self._batches += 1
        if graph.trains:
            whole = graph if has_backward(graph) or self._last is None else joined(self._last, part)
            self._captured(Captured(whole, max(1, self._batches), options.current()))
        if has_backward(graph):
            self._last, self._values = part, [*values, *found]  # kept, so that their ids are not given again
        return found


class _Recorder(Recorder):
    """Of weights, only the shapes are taken."""

    def fill_from_host(self, target: torch.Tensor, source: torch.Tensor, ends_segment: bool = True) -> bool:
        record = record_of(target)
        known = record.value is not None and isinstance(record.value.buffer, Nowhere)
        if (known or source.nbytes > _READABLE_BYTES) and provenance.loading_state():
            record.value = Value(buffer=Nowhere())
            return True
        return super().fill_from_host(target, source, ends_segment)


def _fetch(buffer: Any) -> torch.Tensor:
    return buffer.read()
