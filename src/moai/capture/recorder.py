"""The recorder: operator calls in, segments out.

Each call on accelerator tensors is matched against what followed last time at this point (the replay path: a compare
and an append), or described anew (the slow path: shapes by meta kernels, provenance). Nothing is computed here. A
boundary (`flush`) hands the segment to `execute`; a value is read through `read`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from moai.capture import host_eval, meta, provenance
from moai.capture.functionalize import functionalize
from moai.capture.geometry import contiguous_stride
from moai.capture.operators import Operator
from moai.capture.trace import Call, FloatSpec, FloatsSpec, OutSpec, Seed, SeedSpec, TensorSpec
from moai.capture.values import Base, Record, Usage, Value, geometry_of, record_of
from moai.graph.step_graph import StepGraph, TensorType

Maker = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Callable[[], tuple[torch.Tensor, Record]]]

# A result that the script still holds at a step's end, larger than this, is not kept if it was not used the last time.
KEEP_BYTES = 1 << 20
# A value is worked out on the host if that takes at most this many operators and elements.
HOST_EVAL_OPERATORS = 64
# References to a storage that one tensor has alone: the tensor's, and the storage object that asks.
_SOLE_OWNER = 2
# The tree of calls is started anew when it has grown to this size: a script whose steps all differ would fill memory.
MAX_CALLS = 400_000
# Without gradients there is no step to wait for: an upload ends a segment that has grown to this many calls.
LONG_SEGMENT = 512


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
        self.epoch = 0
        self.n_calls = 0
        self.watched: list[tuple[weakref.ref[Record], Call, Usage]] = []
        self._begin()

    # ------------------------------------------------------------------ recording

    def _begin(self) -> None:
        """Start an empty segment."""
        self.epoch += 1
        self.cursor = self.root
        self.alive: list[weakref.ref[Record]] = []  # by sid
        self.inputs: list[tuple[int, Value]] = []
        self.scalars: list[float | int] = []
        self.held: list[torch.Tensor] = []
        self.optimizer_done = False
        self.departure = ""

    def record(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record one call; returns what the operator returns, without values."""
        if self.optimizer_done and not self.in_optimizer and _begins_a_step(args):
            self.flush()
        cursor = self.cursor
        for call in cursor.children:
            if call.operator is operator:
                n_inputs, n_scalars = len(self.inputs), len(self.scalars)
                if self._matches(call.args, args) and (
                    not (kwargs or call.kwargs) or self._matches_keywords(call.kwargs, kwargs)
                ):
                    self.cursor = call
                    self.stats.replayed += 1
                    if not call.writes:
                        return self._outputs(call) if call.plain else self._nested(call.outs)
                    return self._written(call, args, kwargs)
                self._unbind(n_inputs, n_scalars)
        return self._describe(operator, args, kwargs)

    def _matches(self, specs: Any, args: Any) -> bool:
        """Whether the arguments are those of the specs. Binds storages that come in here, and notes numbers."""
        if len(specs) != len(args):
            return False
        epoch = self.epoch
        for spec, arg in zip(specs, args, strict=True):
            kind = type(spec)
            if kind is TensorSpec:
                try:
                    record = arg.untyped_storage()._moai
                except AttributeError:
                    return False
                if record.epoch != epoch:
                    if spec.fresh != record.base or record.value is None:
                        return False
                    self._bind(record)
                elif record.sid != spec.sid:
                    return False
                if (arg.size(), arg.stride(), arg.storage_offset(), arg.dtype) != spec.geometry:
                    return False
            elif kind is FloatSpec:
                if type(arg) is not float or not spec.accepts(arg):
                    return False
                if spec.varies:
                    self.scalars.append(arg)
            elif kind is tuple:
                if type(arg) not in (list, tuple) or not self._matches(spec, arg):
                    return False
            elif kind is FloatsSpec:
                if type(arg) not in (list, tuple) or len(arg) != spec.length or not _all_floats(arg):
                    return False
                self.scalars.extend(arg)
            elif kind is SeedSpec:
                if type(arg) is not Seed:
                    return False
                self.scalars.append(int(arg))
            elif type(arg) is not kind or arg != spec:
                return False
        return True

    def _matches_keywords(self, specs: dict[str, Any], kwargs: dict[str, Any]) -> bool:
        if len(specs) != len(kwargs):
            return False
        try:
            return self._matches(list(specs.values()), [kwargs[k] for k in specs])
        except KeyError:
            return False

    def _bind(self, record: Record) -> None:
        """Take a storage from before the segment in as the next storage of the segment."""
        value = record.value
        if value is None:
            raise RuntimeError(_missing_text(record))
        record.usage.used = True
        record.epoch = self.epoch
        record.sid = len(self.alive)
        self.alive.append(weakref.ref(record))
        self.inputs.append((record.sid, value))

    def _unbind(self, n_inputs: int, n_scalars: int) -> None:
        """Take back what a failed match bound."""
        for sid, _ in self.inputs[n_inputs:]:
            record = self.alive[sid]()
            if record is not None:
                record.epoch = -1
        if len(self.inputs) > n_inputs:
            del self.alive[self.inputs[n_inputs][0] :]
            del self.inputs[n_inputs:]
        del self.scalars[n_scalars:]

    def _outputs(self, call: Call) -> torch.Tensor:
        """The new tensor of a call with one result (most calls)."""
        spec = call.outs
        tensor, record = spec.make()
        record.epoch = record.written = self.epoch
        record.sid = spec.sid
        record.made_by = call
        self.alive.append(weakref.ref(record))
        return tensor

    def _nested(self, outs: Any) -> Any:
        if outs is None:
            return None
        if isinstance(outs, OutSpec):
            tensor, record = outs.make()
            record.epoch = record.written = self.epoch
            record.sid = outs.sid
            record.made_by = self.cursor
            self.alive.append(weakref.ref(record))
            return tensor
        return type(outs)(self._nested(o) for o in outs)

    def _written(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Mark what a mutating call wrote; return its results (its own arguments and new tensors)."""
        operator = call.operator
        assert operator is not None
        epoch = self.epoch
        targets = [
            args[i] if i < len(args) else kwargs.get(name)
            for i, name in zip(operator.mutated, operator.mutated_names, strict=True)
        ]
        for target in targets:
            for tensor in target if isinstance(target, (list, tuple)) else (target,):
                if tensor is not None:
                    tensor.untyped_storage()._moai.written = epoch
        fresh = iter(self._nested(call.outs) or ())
        results = [next(fresh) if i is None else targets[i] for i in operator.returned]
        if len(results) == 1:
            return results[0]
        return tuple(results) if results else None

    # ------------------------------------------------------------------ the slow path

    def _describe(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Record a call that did not follow here before."""
        args, kwargs = self._adopt_host_tensors(operator, args, kwargs)
        result = meta.infer(operator, args, kwargs)
        if result is meta.UNKNOWN:
            return host_eval.run_on_host(self, operator, args, kwargs)
        if operator.is_out_variant:
            _resize_outputs(operator, kwargs, result)
        if self.cursor.children and not self.departure:
            self.departure = self._explain_departure(operator, args)
        n_inputs, n_scalars = len(self.inputs), len(self.scalars)
        call = Call(self.cursor, operator)
        try:
            call.args = self._specify(args)
            call.kwargs = {k: self._specify(v) for k, v in kwargs.items()}
        except Exception:
            self._unbind(n_inputs, n_scalars)
            raise
        twin = self._widened_twin(call)
        if twin is not None:
            self._unbind(n_inputs, n_scalars)
            return self.record(operator, args, kwargs)
        call.writes = bool(operator.mutated)
        call.origin = provenance.origin_of_current_call(self.in_optimizer)
        call.outs = self._specify_outputs(operator, result, count=[len(self.alive)])
        call.plain = isinstance(call.outs, OutSpec)
        call.saw_backward = call.origin.phase == "backward" or self.cursor.saw_backward
        call.keeps_graph = provenance.backward_keeps_graph() or self.cursor.keeps_graph
        self.cursor.children.insert(0, call)
        self.cursor = call
        self.n_calls += 1
        self.stats.recorded += 1
        if operator.mutated:
            return self._written(call, args, kwargs)
        return self._nested(call.outs)

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
                self.held.append(adopted)
                return adopted
            return arg

        return tuple(adopt(a) for a in args), {k: adopt(v) for k, v in kwargs.items()}

    def _specify(self, arg: Any) -> Any:
        """The spec of an argument (and of each member of a list); binds storages that come in here."""
        if isinstance(arg, torch.Tensor):
            record = record_of(arg)
            if record.epoch == self.epoch:
                return TensorSpec(record.sid, geometry_of(arg), None)
            self._bind(record)
            return TensorSpec(record.sid, geometry_of(arg), record.base)
        if type(arg) is float:
            spec = FloatSpec(arg, self.in_optimizer)
            if spec.varies:
                self.scalars.append(arg)
            return spec
        if type(arg) is Seed:
            self.scalars.append(int(arg))
            return SeedSpec()
        if isinstance(arg, (list, tuple)):
            if arg and self.in_optimizer and _all_floats(arg):
                self.scalars.extend(arg)
                return FloatsSpec(len(arg))
            if any(isinstance(a, (torch.Tensor, float, list, tuple)) for a in arg):
                return tuple(self._specify(a) for a in arg)
            return list(arg)
        if isinstance(arg, torch.SymInt):
            return int(arg)
        return arg

    def _specify_outputs(self, operator: Operator, result: Any, count: list[int]) -> Any:
        """OutSpecs for the new tensors of a call (for a mutating one: a list of those only)."""
        if operator.mutated:
            results = result if isinstance(result, tuple) else (result,)
            new = [r for r, i in zip(results, operator.returned, strict=False) if i is None]
            return [self._out_spec(r, count) for r in new] or None
        return self._out_spec(result, count)

    def _out_spec(self, result: Any, count: list[int]) -> Any:
        if result is None:
            return None
        if isinstance(result, torch.Tensor):
            size, stride = tuple(result.size()), result.stride()
            if not meta.is_dense(size, stride):
                stride = contiguous_stride(size)
            base = (size, stride, result.dtype)
            spec = OutSpec(count[0], base, self.make(*base))
            count[0] += 1
            return spec
        return type(result)(self._out_spec(r, count) for r in result)

    def _widened_twin(self, call: Call) -> Call | None:
        """If a sibling differs in nothing but constant floats: make those inputs of the graph, and return it. What was
        compiled with the constants is forgotten."""
        for sibling in self.cursor.children:
            if sibling.operator is call.operator and _equal_but_floats(
                (sibling.args, sibling.kwargs), (call.args, call.kwargs), widen=False
            ):
                _equal_but_floats((sibling.args, sibling.kwargs), (call.args, call.kwargs), widen=True)
                _forget_compiled(sibling)
                return sibling
        return None

    def _explain_departure(self, operator: Operator, args: tuple[Any, ...]) -> str:
        expected = self.cursor.children[0].operator
        what = (
            f"{operator.name} instead of {expected}"
            if expected is not operator
            else f"{operator.name} with other arguments"
        )
        shapes = ", ".join(str(list(a.shape)) for a in args if isinstance(a, torch.Tensor))
        return f"{what} (shapes {shapes}){provenance.in_script()}"

    # ------------------------------------------------------------------ boundaries

    def optimizer_step_begins(self) -> None:
        """The script called an optimizer's step()."""
        self.in_optimizer = True

    def optimizer_step_ends(self) -> None:
        """step() has returned: the next upload or forward operator begins a new segment."""
        self.in_optimizer = False
        self.optimizer_done = True

    def allocate(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An accelerator tensor without a value. Reading it before it is written gives zeros."""
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
        if self.optimizer_done:
            return True
        if tensor.dim() == 0:
            return False
        return self.cursor.saw_backward or (not torch.is_grad_enabled() and self.cursor.depth > LONG_SEGMENT)

    def flush(self, reading: Record | None = None) -> None:
        """End the segment and hand it to the devices. `reading` is the storage whose value is wanted now."""
        if self.cursor is self.root:
            return
        end, alive, inputs, scalars = self.cursor, self.alive, self.inputs, self.scalars
        epoch, departure = self.epoch, self.departure
        may_drop = end.saw_backward and not end.keeps_graph and os.environ.get("MOAI_KEEP_OUTPUTS") != "1"
        self._begin()
        self._learn_what_was_unused()
        records = [ref() for ref in alive]
        kept = tuple(r is not None and (r is reading or not (may_drop and self._droppable(r))) for r in records)
        try:
            compiled = self._compiled(end, kept, inputs, departure)
            values = dict(inputs)
            buffers = self.execute(Segment(compiled.graph, [values[sid] for sid in compiled.input_sids], scalars))
        except BaseException as error:
            for record in records:
                if record is not None and record.written == epoch:
                    record.value, record.lost = None, f"The step that computed this value failed: {error}"
            raise
        self.stats.segments += 1
        if self.n_calls > MAX_CALLS:
            self._start_over()
        for sid, buffer in zip(compiled.output_sids, buffers, strict=True):
            record = records[sid]
            assert record is not None
            record.value = Value(buffer=buffer)
        for record, keep in zip(records, kept, strict=True):
            if record is not None and not keep:
                record.value, record.lost = None, _dropped_text(record)

    def _start_over(self) -> None:
        """Forget all segments seen. Storages still point to the calls that made them, so the tree is taken apart."""
        stack = [self.root]
        while stack:
            call = stack.pop()
            stack.extend(call.children)
            call.children.clear()
            call.compiled.clear()
        self.n_calls = 0
        self.forget()

    def _droppable(self, record: Record) -> bool:
        """Large, made by the forward pass of this segment, and after an earlier step held but never used."""
        call = record.made_by
        if (
            call is None
            or call.origin.phase != "forward"
            or TensorType(record.base[0], record.base[2]).nbytes <= KEEP_BYTES
        ):
            return False
        if not call.kept_unused:
            record.usage = Usage()
            self.watched.append((weakref.ref(record), call, record.usage))
        return call.kept_unused

    def _learn_what_was_unused(self) -> None:
        """Look at the large results kept by earlier steps: those that died without a use need not be kept again."""
        still_alive = []
        for ref, call, usage in self.watched:
            if ref() is None:
                call.kept_unused = not usage.used
            elif not usage.used:
                still_alive.append((ref, call, usage))
        self.watched = still_alive

    def _compiled(self, end: Call, kept: tuple[bool, ...], inputs: list[tuple[int, Value]], departure: str) -> Compiled:
        key = (kept, tuple(value.role for _, value in inputs))
        compiled = end.compiled.get(key)
        if compiled is None:
            compiled = self._build(end, kept, inputs)
            cause = departure or ("other values are held at its end" if end.compiled else "")
            end.compiled[key] = compiled
            self.stats.graphs += 1
            self.on_new_graph(compiled.graph, cause)
        return compiled

    def _build(self, end: Call, kept: tuple[bool, ...], inputs: list[tuple[int, Value]]) -> Compiled:
        return Compiled(*functionalize(end.path(), kept, {sid: value.role for sid, value in inputs}))

    # ------------------------------------------------------------------ reading

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The value of an accelerator tensor as a CPU tensor that shares nothing with the accelerator's."""
        record = record_of(tensor)
        record.usage.used = True
        if record.written == self.epoch:
            on_host = host_eval.evaluate(self, record, HOST_EVAL_OPERATORS)
            if on_host is not None:
                self.stats.host_reads += 1
                return _window(on_host, tensor)
            self.flush(reading=record)
        if record.value is not None and record.value.role == "undefined":
            return torch.zeros(tensor.size(), dtype=tensor.dtype)
        if record.value is None:
            raise RuntimeError(_missing_text(record))
        if record.value.host is not None:
            return _window(record.value.host, tensor).clone()
        base = self.fetch(record.value.buffer)
        size, stride, dtype = record.base
        host = torch.empty_strided(size, stride, dtype=dtype).copy_(base)
        if host.nbytes <= KEEP_BYTES:
            record.value.host = host
        return _window(host, tensor).clone()


def _begins_a_step(args: tuple[Any, ...]) -> bool:
    """Whether a call after an optimizer step belongs to a new forward pass: it works on what needs gradients."""
    return torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args)


def _all_floats(items: Any) -> bool:
    return all(type(i) is float for i in items)


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


def _resize_outputs(operator: Operator, kwargs: dict[str, Any], result: Any) -> None:
    """Give `out=` tensors the shape of the result, as every device does."""
    results = result if isinstance(result, tuple) else (result,)
    for name, wanted in zip(operator.mutated_names, results, strict=False):
        out = kwargs[name]
        if isinstance(out, torch.Tensor) and out.shape != wanted.shape:
            out.resize_(wanted.shape)


def _equal_but_floats(a: Any, b: Any, widen: bool) -> bool:
    """Whether two specs agree in all but constant floats; with `widen`, those of `a` that differ become inputs."""
    if type(a) is not type(b):
        return False
    if isinstance(a, TensorSpec):
        return (a.sid, a.geometry, a.fresh) == (b.sid, b.geometry, b.fresh)
    if isinstance(a, FloatSpec):
        if widen and not a.accepts(b.value):
            a.varies = True
        return True
    if isinstance(a, (FloatsSpec, SeedSpec)):
        return getattr(a, "length", 0) == getattr(b, "length", 0)
    if isinstance(a, tuple):
        return len(a) == len(b) and all(_equal_but_floats(x, y, widen) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal_but_floats(a[k], b[k], widen) for k in a)
    return bool(a == b)


def _forget_compiled(call: Call) -> None:
    """Drop the graphs of every segment that passes through `call`."""
    stack = [call]
    while stack:
        node = stack.pop()
        node.compiled.clear()
        stack.extend(node.children)


def _missing_text(record: Record) -> str:
    text, where = record.lost or "This accelerator tensor never received a value.", provenance.in_script()
    return f"{text} It was used{where}." if where else text


def _dropped_text(record: Record) -> str:
    size, _, dtype = record.base
    call = record.made_by
    where = f" at {call.origin.where}" if call is not None and call.origin.where else ""
    mib = TensorType(size, dtype).nbytes / 2**20
    return (
        f"The value of this {dtype} tensor of shape {list(size)} ({mib:.0f} MiB), computed{where}, was not kept when "
        "its step ended: the script had held such a tensor after an earlier step without using it. Use it (print, "
        ".argmax(), .cpu(), ...) "
        "before the loss is read or the next batch is uploaded, or set MOAI_KEEP_OUTPUTS=1 to keep all of them."
    )
