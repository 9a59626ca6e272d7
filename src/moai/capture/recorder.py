"""The recorder: operator calls in, segments out.

Each call on accelerator tensors is matched against what followed last time at this point (the replay path: a compare
and an append), or described anew (the slow path: shapes by meta kernels, provenance). Nothing is computed here. A
boundary (`flush`) hands the segment to `execute`; a value is read through `read`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from moai.capture import at_hand, certain, describe, host_eval, meta, provenance
from moai.capture.describe import Maker
from moai.capture.functionalize import functionalize
from moai.capture.geometry import contiguous_stride
from moai.capture.held import KEEP_BYTES, HeldValues, dropped_text
from moai.capture.operators import Operator
from moai.capture.segment import OpenSegment, missing_text
from moai.capture.stretch import Stretch, Tape
from moai.capture.trace import Call, OutSpec, tensor_specs
from moai.capture.values import Base, Record, Role, Value, geometry_of, record_of
from moai.graph.step_graph import StepGraph

# A value is worked out on the host if that takes at most this many operators and elements.
HOST_EVAL_OPERATORS = 64
# References to a storage that one tensor has alone: the tensor's, and the storage object that asks.
_SOLE_OWNER = 2
# The tree of calls is started anew when it has grown to this size: a script whose steps all differ would fill memory.
MAX_CALLS = 400_000
# Without gradients there is no step to wait for: an upload ends a segment that has grown to this many calls.
LONG_SEGMENT = 512

_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Segment:
    """What `execute` gets: a graph, the content of its inputs, the numbers of this run."""

    graph: StepGraph
    inputs: list[Value]
    scalars: list[float | int]


@dataclass(frozen=True, slots=True)
class Compiled:
    """A segment's graph with the storages (by sid) that its inputs and outputs belong to."""

    graph: StepGraph
    input_sids: tuple[int, ...]
    output_sids: tuple[int, ...]


@dataclass(slots=True)
class Stats:
    """Counts since the start: calls matched, calls described anew, views, segments run, graphs built."""

    replayed: int = 0
    recorded: int = 0
    views: int = 0
    segments: int = 0
    graphs: int = 0
    host_reads: int = 0


class Recorder:
    """See the module docstring.

    `make`: (size, stride, dtype) -> maker of accelerator tensors. `execute`: Segment -> buffers of the graph's
    outputs. `fetch`: buffer -> CPU tensor. `on_new_graph`: called with (graph, cause) when a segment has a graph not
    seen before. `forget`: called when the graphs made so far will not come again.
    """

    def __init__(
        self,
        make: Maker,
        execute: Callable[[Segment], list[Any]],
        fetch: Callable[[Any], torch.Tensor],
        on_new_graph: Callable[[StepGraph, str], None],
        forget: Callable[[], None],
    ) -> None:
        self.make = make
        self.execute = execute
        self.fetch = fetch
        self.on_new_graph = on_new_graph
        self.forget = forget
        self.stats = Stats()
        self.in_optimizer = False
        self.root = Call(None, None)
        self.n_calls = 0
        self.held_values = HeldValues()
        self.segment = OpenSegment(self.root, 1)
        self.tape: Tape | None = None

    # ------------------------------------------------------------------ recording

    def record(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record one call; returns what the operator returns, without values."""
        if not torch.is_grad_enabled() and not self.in_optimizer and not provenance.in_backward():
            if at_hand.may_be(args, kwargs):
                result = at_hand.compute(self, operator, args, kwargs)
                if result is not at_hand.UNKNOWN:
                    return result
            if not operator.mutated:
                args = at_hand.alone(self, args)
        segment = self.segment
        if segment.optimizer_done and not self.in_optimizer and _begins_a_step(args):
            self.flush()
            segment = self.segment
        for call in segment.cursor.children:
            if call.operator is operator:
                n_inputs, n_scalars = len(segment.inputs), len(segment.scalars)
                if segment.matches(call.args, args) and (
                    not (kwargs or call.kwargs) or segment.matches_keywords(call.kwargs, kwargs)
                ):
                    segment.cursor = call
                    self.stats.replayed += 1
                    if not call.writes:
                        return segment.output(call) if call.plain else segment.nested(call.outs)
                    return segment.written(call, args, kwargs)
                segment.unbind(n_inputs, n_scalars)
        return self._describe(operator, args, kwargs)

    def taped(
        self, function: Callable[[], _Result], arguments: Sequence[torch.Tensor], results: Callable[[_Result], Any]
    ) -> tuple[_Result, Stretch | None, str]:
        """Calls `function`, which takes these accelerator tensors. What it returns; how to do the same again without
        calling it, if that is possible, or why not. `results`: the accelerator tensors in what it returned."""
        if self.tape is not None:
            return function(), None, "it is part of another"
        self.tape = tape = Tape(self, arguments)
        try:
            returned = function()
        finally:
            self.tape = None
        return returned, tape.finish(results(returned)), tape.spoiled

    def spoil_tape(self, why: str) -> None:
        """What happens now cannot be repeated by a stretch."""
        if self.tape is not None:
            self.tape.spoil(why)

    # ------------------------------------------------------------------ the slow path

    def _describe(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call that did not follow here before."""
        args, kwargs = self._adopt_host_tensors(operator, args, kwargs)
        result = meta.infer(operator, args, kwargs)
        if result is meta.UNKNOWN:
            return self._run_on_host(operator, args, kwargs)
        if operator.is_out_variant:
            describe.resize_outputs(operator, kwargs, result)
        segment = self.segment
        if segment.cursor.children and not segment.departure:
            segment.departure = describe.explain_departure(segment.cursor, operator, args)
        n_inputs, n_scalars = len(segment.inputs), len(segment.scalars)
        call = Call(segment.cursor, operator)
        call.origin = provenance.origin_of_current_call(self.in_optimizer)
        floats_vary = call.origin.phase == "optimizer"
        try:
            call.args = tuple(describe.specify(segment, a, floats_vary) for a in args)
            call.kwargs = {k: describe.specify(segment, v, floats_vary) for k, v in kwargs.items()}
        except Exception:
            segment.unbind(n_inputs, n_scalars)
            raise
        if describe.widened_twin(call) is not None:
            segment.unbind(n_inputs, n_scalars)
            return self.record(operator, args, kwargs)
        call.writes = bool(operator.mutated)
        call.outs = describe.specify_outputs(operator, result, len(segment.alive), self.make)
        call.plain = isinstance(call.outs, OutSpec)
        call.saw_backward = call.origin.phase == "backward" or segment.cursor.saw_backward
        call.keeps_graph = provenance.backward_keeps_graph() or segment.cursor.keeps_graph
        segment.cursor.children.insert(0, call)
        segment.cursor = call
        self.n_calls += 1
        self.stats.recorded += 1
        return segment.written(call, args, kwargs) if call.writes else segment.nested(call.outs)

    def _run_on_host(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What is made of numbers alone, as an identity matrix is, is no data."""
        self.spoil_tape(f"{operator.name} runs on the host")
        written = [args[i] for i in operator.mutated if i < len(args)]
        written += [kwargs[name] for name in operator.mutated_names if name in kwargs]
        targets = {id(t) for t in at_hand.tensors(written)}
        data = [t for t in at_hand.tensors((*args, *kwargs.values())) if id(t) not in targets]
        role: Role = "batch" if data else "state"
        result = host_eval.run_on_host(operator, args, kwargs, self.read, lambda x: self.upload_result(x, role))
        for target in at_hand.tensors(written):
            value = record_of(target).value
            if not data and operator.is_out_variant and value is not None and value.role == "batch":
                value.role = "state"
        return result

    def _adopt_host_tensors(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        """Upload the CPU tensors that CUDA would accept beside device tensors (0-dim ones, index tensors)."""
        indexes = "index" in operator.name

        def adopt(arg: Any) -> Any:
            if isinstance(arg, (list, tuple)) and any(isinstance(a, torch.Tensor) for a in arg):
                return type(arg)(adopt(a) for a in arg)
            if isinstance(arg, torch.Tensor) and arg.device.type == "cpu":
                if arg.dim() and not indexes:
                    raise RuntimeError(
                        f"Expected all tensors to be on the same device, but {operator.name} got a tensor of shape "
                        f"{tuple(arg.shape)} on the CPU beside tensors on the accelerator"
                        f"{provenance.in_script()}. Move it first: tensor.to('cuda')."
                    )
                adopted = self.upload(arg, ends_segment=False)
                self.segment.held.append(adopted)
                return adopted
            return arg

        return tuple(adopt(a) for a in args), {k: adopt(v) for k, v in kwargs.items()}

    # ------------------------------------------------------------------ boundaries

    def optimizer_step_begins(self) -> None:
        """The script called an optimizer's step()."""
        self.in_optimizer = True

    def optimizer_step_ends(self) -> None:
        """step() has returned: the next upload or forward operator begins a new segment."""
        self.in_optimizer = False
        self.segment.optimizer_done = True

    def allocate(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An accelerator tensor without a value. Reading it before it is written gives zeros."""
        self.spoil_tape("it allocates or uploads a tensor")
        if not meta.is_dense(size, stride):
            stride = contiguous_stride(size)
        tensor, record = self.make(size, stride, dtype)()
        record.value = Value(role="undefined")
        return tensor

    def upload(self, tensor: torch.Tensor, ends_segment: bool = True) -> torch.Tensor:
        """A CPU tensor as an accelerator tensor."""
        result = self.allocate(tuple(tensor.size()), tensor.stride(), tensor.dtype)
        self.fill_from_host(result, tensor, ends_segment)
        return result

    def upload_result(self, tensor: torch.Tensor, role: Role) -> torch.Tensor:
        """What the host computed for the script, which begins no step."""
        size, stride, dtype = tuple(tensor.size()), tensor.stride(), tensor.dtype
        if not meta.is_dense(size, stride):
            stride = contiguous_stride(size)
        result, record = self.make(size, stride, dtype)()
        with torch.no_grad():
            record.value = Value(host=torch.empty_strided(size, stride, dtype=dtype).copy_(tensor), role=role)
        return result

    def fill_from_host(self, target: torch.Tensor, source: torch.Tensor, ends_segment: bool = True) -> bool:
        """Give a newly allocated tensor the content of a CPU tensor, cast and broadcast to its type; False if `target`
        has been used before. The copy stays on the host until the plan is known."""
        record = record_of(target)
        size, stride, offset, dtype = geometry_of(target)
        untouched = record.value is not None and record.value.role == "undefined" and record.epoch == -1
        if not untouched or (size, stride, dtype) != record.base or offset:
            return False
        if ends_segment and not self.in_optimizer and self._upload_begins_a_step(source):
            self.flush()
        is_state = provenance.loading_state()
        if is_state and _is_handed_over(source, record.base):
            host = source.detach()
        else:
            host = torch.empty_strided(size, stride, dtype=dtype)
            with torch.no_grad():
                host.copy_(source)
        record.value = Value(host=host, role="state" if is_state else "batch")
        return True

    def _upload_begins_a_step(self, tensor: torch.Tensor) -> bool:
        if self.segment.optimizer_done:
            return True
        if tensor.dim() == 0:
            return False
        cursor = self.segment.cursor
        return cursor.saw_backward or (not torch.is_grad_enabled() and cursor.depth > LONG_SEGMENT)

    def flush(self, reading: Record | None = None) -> None:
        """End the segment and hand it to the devices. `reading` is the storage whose value is wanted now."""
        ended = self.segment
        end = ended.cursor
        if end is self.root:
            return
        self.segment = OpenSegment(self.root, ended.epoch + 1)
        self.held_values.learn()
        may_drop = end.saw_backward and not end.keeps_graph and os.environ.get("MOAI_KEEP_OUTPUTS") != "1"
        records = [ref() for ref in ended.alive]
        older = {sid for sid, _ in ended.inputs}
        kept = tuple(
            r is not None and (not may_drop or sid in older or r is reading or not self.held_values.droppable(r))
            for sid, r in enumerate(records)
        )
        try:
            compiled = self._compiled(ended, kept)
            values = dict(ended.inputs)
            inputs = [values[sid] for sid in compiled.input_sids]
            buffers = self.execute(Segment(compiled.graph, inputs, ended.scalars))
        except BaseException as error:
            for record in records:
                if record is not None and record.written == ended.epoch:
                    record.value, record.lost = None, f"The step that computed this value failed: {error}"
            raise
        self.stats.segments += 1
        for sid, buffer in zip(compiled.output_sids, buffers, strict=True):
            record = records[sid]
            assert record is not None
            record.value = Value(buffer=buffer)
        for record, keep in zip(records, kept, strict=True):
            if record is not None and not keep:
                record.value, record.lost = None, dropped_text(record)
        if self.n_calls > MAX_CALLS:
            self._start_over()

    def _start_over(self) -> None:
        """Forget all segments seen. Storages still point to the calls that made them, so the tree is taken apart."""
        stack = [self.root]
        while stack:
            call = stack.pop()
            stack.extend(call.children)
            call.children.clear()
            call.compiled.clear()
            call.needed.clear()
        self.n_calls = 0
        self.forget()

    def _compiled(self, ended: OpenSegment, kept: tuple[bool, ...]) -> Compiled:
        """The graph of a segment, made if it has not been seen with these values held and these roles of its inputs."""
        roles = {sid: value.role for sid, value in ended.inputs}
        key = (kept, tuple(roles.values()))
        known = ended.cursor.compiled
        if key not in known:
            cause = ended.departure or ("other values are held at its end" if known else "")
            known[key] = Compiled(*functionalize(ended.cursor.path(), kept, roles))
            self.stats.graphs += 1
            self.on_new_graph(known[key].graph, cause)
        return known[key]

    # ------------------------------------------------------------------ reading

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of an accelerator tensor as a CPU tensor that shares nothing with the accelerator's."""
        self.spoil_tape("it reads a tensor's value")
        return self.content(tensor)

    def content(self, tensor: torch.Tensor) -> torch.Tensor:
        """`read` for what is computed here: the script does not see the value."""
        record = record_of(tensor)
        record.usage.used = True
        if record.written == self.segment.epoch:
            known = certain.content(self.segment, record)
            if known is not None:
                return _window(known, tensor)
            on_host = host_eval.evaluate(self.segment, record, HOST_EVAL_OPERATORS)
            if on_host is not None:
                self.stats.host_reads += 1
                return _window(on_host, tensor)
            asked = self._asked_about(record)
            self.flush(reading=record)
            for number in asked:
                self.keep_on_host(number)
        if record.value is not None and record.value.role == "undefined":
            return torch.zeros(tensor.size(), dtype=tensor.dtype)
        if record.value is None:
            raise RuntimeError(missing_text(record))
        if record.value.host is not None:
            return _window(record.value.host, tensor).clone()
        return _window(self._fetched(record), tensor).clone()

    def resident(self, tensor: torch.Tensor) -> Any:
        """The buffer whose entries are those of `tensor`, if its value lies on the devices and it is all of its
        storage; else None. Runs what is recorded if `tensor` follows from it."""
        record = record_of(tensor)
        record.usage.used = True
        if record.written == self.segment.epoch:
            self.flush(reading=record)
        size, stride, offset, dtype = geometry_of(tensor)
        whole = (size, stride, dtype) == record.base and not offset
        return record.value.buffer if whole and record.value is not None else None

    def _fetched(self, record: Record) -> torch.Tensor:
        """The content of a storage that is on the devices; a small one stays here, too."""
        assert record.value is not None
        base = self.fetch(record.value.buffer)
        size, stride, dtype = record.base
        host = torch.empty_strided(size, stride, dtype=dtype).copy_(base)
        if host.nbytes <= KEEP_BYTES:
            record.value.host = host
        return host

    def _asked_about(self, record: Record) -> list[Record]:
        """The pending single numbers that a pending yes or no is computed of. Who asks whether a loss is NaN asks next
        whether it is infinite: that should not end another segment."""
        call = record.made_by
        if record.base[2] != torch.bool or call is None or record.base[0]:
            return []
        if any(sid == record.sid for sid, _ in self.segment.inputs):
            return []  # made in an earlier segment, and written to in this one
        found = [self.segment.alive[spec.sid]() for spec in tensor_specs(call)]
        return [r for r in found if r is not None and not r.base[0]]

    def keep_on_host(self, record: Record) -> None:
        """Fetch the content of a small storage, if it is on the devices only."""
        if record.value is not None and record.value.buffer is not None and record.value.host is None:
            self._fetched(record)


def _begins_a_step(args: tuple[Any, ...]) -> bool:
    """Whether a call after an optimizer step belongs to a new forward pass: it works on what needs gradients."""
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def _window(base: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """The view of `base` (on the host) that `tensor` is of its storage."""
    size, stride, offset, dtype = geometry_of(tensor)
    if dtype == base.dtype:
        return base.as_strided(size, stride, offset)
    return torch.empty(0, dtype=dtype).set_(base.untyped_storage(), offset, size, stride)


def _is_handed_over(source: torch.Tensor, base: Base) -> bool:
    """Whether a module's CPU tensor is on its way out (Module.to replaces it by the accelerator's) and nothing else
    sees its memory, which can then be taken over instead of copied: a model is in memory once."""
    size, stride, _, dtype = geometry_of(source)
    storage = source.untyped_storage()
    is_whole = (size, stride, dtype) == base and storage.nbytes() == source.nbytes
    return is_whole and provenance.moving_module() and torch._C._storage_Use_Count(storage._cdata) == _SOLE_OWNER
