"""Recorded calls -> StepGraph: mutation and aliasing disappear.

Every storage has a current value (its base tensor). Reading a tensor derives its view from that value; writing one
puts the new content back through the inverses of the same view steps, so every later reader of the storage sees it.
Both go by geometry (`capture.geometry`); where geometry has no such steps, the strided operators of `graph.ops` do it.
"""

from __future__ import annotations

from typing import Any

import torch

import moai.graph.ops  # noqa: F401  (registers torch.ops.moai)
from moai.capture.geometry import ViewStep, view_chain
from moai.capture.operators import functional_twin
from moai.capture.trace import (
    Call,
    FloatSpec,
    FloatsSpec,
    OutSpec,
    SeedSpec,
    TensorSpec,
    tensor_specs,
    written_specs,
)
from moai.capture.values import Base, Geometry, Role
from moai.graph.step_graph import Input, Node, Origin, Output, Ref, Scalar, StepGraph, TensorType, refs

aten = torch.ops.aten

# Written without looking at the old content, by name of the schema.
_FILLS = {"aten::zero_", "aten::fill_"}


class Functionalizer:
    """Builds one graph. `kept[sid]`: storage `sid` lives on; `roles[sid]` (of storages from before): what its value
    is."""

    def __init__(self, kept: tuple[bool, ...], roles: dict[int, Role]) -> None:
        self.kept = kept
        self.roles = roles
        self.types: list[TensorType] = []
        self.nodes: list[Node] = []
        self.input_ids: dict[int, int] = {}
        self.n_scalars = 0
        self.current: dict[int, int] = {}
        self.bases: dict[int, Base] = {}
        self.version: dict[int, int] = {}
        self.written: set[int] = set()
        self.views: dict[tuple[int, Geometry], tuple[int, int]] = {}
        self.origin = Origin("forward")

    # ------------------------------------------------------------------ values

    def _value(self, type: TensorType) -> int:
        self.types.append(type)
        return len(self.types) - 1

    def emit(self, op: torch._ops.OpOverload, args: tuple[Any, ...], type: TensorType, **kwargs: Any) -> int:
        """Append a node with one result."""
        out = self._value(type)
        self.nodes.append(Node(op, args, kwargs, out, self.origin))
        return out

    def define(self, sid: int, base: Base, value: int) -> None:
        """A storage comes to life with a value."""
        self.current[sid], self.bases[sid], self.version[sid] = value, base, 0

    # ------------------------------------------------------------------ views

    def read(self, spec: TensorSpec) -> int:
        """The value of a tensor now."""
        size, stride, offset, dtype = spec.geometry
        base = self.bases[spec.sid]
        if (size, stride, dtype) == base and offset == 0:
            return self.current[spec.sid]
        key = (spec.sid, spec.geometry)
        known = self.views.get(key)
        if known is not None and known[1] == self.version[spec.sid]:
            return known[0]
        steps = self._steps(base, spec.geometry)
        if steps is None:
            args = (Ref(self.current[spec.sid]), base[1], size, stride, offset, dtype)
            value = self.emit(torch.ops.moai.as_strided.default, args, TensorType(size, dtype))
        else:
            value = self._apply(steps, self.current[spec.sid])[-1]
        self.views[key] = (value, self.version[spec.sid])
        return value

    @staticmethod
    def _steps(base: Base, geometry: Geometry) -> tuple[ViewStep, ...] | None:
        size, stride, offset, dtype = geometry
        return view_chain(base[0], base[1], size, stride, offset) if dtype == base[2] else None

    def _apply(self, steps: tuple[ViewStep, ...], value: int) -> list[int]:
        """The values along a chain of steps, the starting one first."""
        chain = [value]
        for step in steps:
            op, args = _VIEW_OPS[step.kind], step.args
            if step.kind == "slice":
                args = (args[0], args[1], args[2], 1)
            chain.append(self.emit(op, (Ref(chain[-1]), *args), TensorType(step.size, self.types[value].dtype)))
        return chain

    def write(self, spec: TensorSpec, value: int) -> None:
        """Give a tensor new content (`value`, cast and broadcast to its type)."""
        size, stride, offset, dtype = spec.geometry
        value = self._conform(value, TensorType(size, dtype))
        base = self.bases[spec.sid]
        old = self.current[spec.sid]
        if (size, stride, dtype) == base and offset == 0:
            new = value
        else:
            steps = self._steps(base, spec.geometry)
            if steps is None:
                args = (Ref(old), base[1], Ref(value), size, stride, offset)
                new = self.emit(torch.ops.moai.as_strided_scatter.default, args, self.types[old])
            else:
                new = self._scatter(steps, old, value)
        self.current[spec.sid] = new
        self.version[spec.sid] += 1
        self.written.add(spec.sid)
        self.views[(spec.sid, spec.geometry)] = (value, self.version[spec.sid])

    def _scatter(self, steps: tuple[ViewStep, ...], base: int, value: int) -> int:
        """The base with the end of the chain replaced by `value`."""
        last_window = max((i for i, s in enumerate(steps) if s.kind in ("slice", "select")), default=-1)
        chain = self._apply(steps[:last_window], base) if last_window >= 0 else [base]
        for i in range(len(steps) - 1, -1, -1):
            step = steps[i]
            before = self.types[base].shape if i == 0 else steps[i - 1].size
            type = TensorType(before, self.types[base].dtype)
            if step.kind == "permute":
                inverse = tuple(step.args[0].index(d) for d in range(len(before)))
                value = self.emit(aten.permute.default, (Ref(value), inverse), type)
            elif step.kind == "reshape":
                value = self.emit(aten.reshape.default, (Ref(value), before), type)
            elif step.kind == "expand":
                value = self._last_writes(value, before)
            elif step.kind == "slice":
                dim, start, end = step.args
                value = self.emit(aten.slice_scatter.default, (Ref(chain[i]), Ref(value), dim, start, end, 1), type)
            else:
                value = self.emit(aten.select_scatter.default, (Ref(chain[i]), Ref(value), *step.args), type)
        return value

    def _last_writes(self, value: int, size: tuple[int, ...]) -> int:
        """What stays of a value written to an expanded tensor of `size`: of the elements that meet, the last."""
        for dim, length in enumerate(size):
            type = self.types[value]
            if type.shape[dim] != length:
                last = TensorType((*type.shape[:dim], 1, *type.shape[dim + 1 :]), type.dtype)
                args = (Ref(value), dim, type.shape[dim] - 1, type.shape[dim], 1)
                value = self.emit(aten.slice.Tensor, args, last)
        return value

    def _conform(self, value: int, wanted: TensorType) -> int:
        if self.types[value].dtype != wanted.dtype:
            type = TensorType(self.types[value].shape, wanted.dtype)
            value = self.emit(aten._to_copy.default, (Ref(value),), type, dtype=wanted.dtype)
        if self.types[value].shape != wanted.shape:
            value = self.emit(aten.expand.default, (Ref(value), wanted.shape), wanted)
        return value

    # ------------------------------------------------------------------ calls

    def call(self, call: Call) -> None:
        """Append one recorded call."""
        self.origin = call.origin
        for spec in tensor_specs(call):
            if spec.fresh is not None:
                self._enter(spec.sid, spec.fresh)
        operator = call.operator
        assert operator is not None
        if operator.mutated:
            self._mutating_call(call)
            return
        args = tuple(self._argument(s) for s in call.args)
        kwargs = {k: self._argument(s) for k, s in call.kwargs.items() if k not in ("device", "pin_memory", "layout")}
        outs = self._result_ids(call.outs)
        self.nodes.append(Node(operator.op, args, kwargs, outs, self.origin))
        self._define_outs(call.outs, outs)

    def _enter(self, sid: int, base: Base) -> None:
        """A storage from before the segment comes in."""
        type = TensorType(base[0], base[2])
        if self.roles[sid] == "undefined":
            self.define(sid, base, self._fill(type, 0))
            return
        self.input_ids[sid] = self._value(type)
        self.define(sid, base, self.input_ids[sid])

    def _argument(self, spec: Any) -> Any:
        if isinstance(spec, TensorSpec):
            return Ref(self.read(spec))
        if isinstance(spec, FloatSpec):
            return self._scalar() if spec.varies else spec.value
        if isinstance(spec, SeedSpec):
            return self._scalar()
        if isinstance(spec, FloatsSpec):
            return tuple(self._scalar() for _ in range(spec.length))
        if isinstance(spec, (tuple, list)):
            return tuple(self._argument(s) for s in spec)
        return spec

    def _scalar(self) -> Scalar:
        self.n_scalars += 1
        return Scalar(self.n_scalars - 1)

    def _fill(self, type: TensorType, value: Any) -> int:
        return self.emit(aten.full.default, (type.shape, value), type, dtype=type.dtype)

    def _result_ids(self, outs: Any) -> Any:
        if isinstance(outs, OutSpec):
            return self._value(outs.type)
        return None if outs is None else tuple(self._result_ids(o) for o in outs)

    def _define_outs(self, outs: Any, ids: Any) -> None:
        if isinstance(outs, OutSpec):
            self.define(outs.sid, outs.base, ids)
        elif outs is not None:
            for o, i in zip(outs, ids, strict=True):
                self._define_outs(o, i)

    def _mutating_call(self, call: Call) -> None:
        operator = call.operator
        assert operator is not None
        name = operator.op._schema.name
        targets = written_specs(call)
        if name == "aten::copy_":
            self.write(targets[0], self.read(call.args[1]))
        elif name in _FILLS:
            self._fill_call(call, targets[0])
        elif name == "aten::_foreach_zero_":
            for target in targets:
                self.write(target, self._fill(TensorType(target.geometry[0], target.geometry[3]), 0))
        elif name.startswith("aten::_foreach_") and _meet(call, targets):
            self._one_by_one(call, targets)
        else:
            self._functional_call(call, targets)

    def _one_by_one(self, call: Call, targets: list[TensorSpec]) -> None:
        """Emit a foreach operator member by member, in order: a later member sees what an earlier one wrote."""
        assert call.operator is not None
        op, listed = functional_twin(call.operator.op), _list_arguments(call.operator.op)
        assert op is not None
        numbered = [s if _holds_tensors(s) else self._argument(s) for s in call.args]
        kwargs = {k: self._argument(s) for k, s in call.kwargs.items()}
        for i, target in enumerate(targets):
            members = [a[i : i + 1] if is_list else a for a, is_list in zip(numbered, listed, strict=False)]
            args = tuple(self._argument(a) for a in members)
            value = self._value(TensorType(target.geometry[0], target.geometry[3]))
            self.nodes.append(Node(op, args, kwargs, (value,), self.origin))
            self.write(target, value)

    def _fill_call(self, call: Call, target: TensorSpec) -> None:
        number = self._argument(call.args[1]) if len(call.args) > 1 else 0
        if isinstance(number, Ref):
            self.write(target, number.id)
        else:
            self.write(target, self._fill(TensorType(target.geometry[0], target.geometry[3]), number))

    def _functional_call(self, call: Call, targets: list[TensorSpec]) -> None:
        """Emit the functional twin of a mutating operator, and write its results back."""
        operator = call.operator
        assert operator is not None
        twin = functional_twin(operator.op)
        if twin is None:
            raise RuntimeError(
                f"{operator.name} writes its arguments and has no functional form; it cannot be captured."
            )
        dropped = operator.mutated_names if operator.is_out_variant else ()
        args = tuple(self._argument(s) for s in call.args)
        kwargs = {k: self._argument(s) for k, s in call.kwargs.items() if k not in dropped}
        if twin._schema.name.startswith(("aten::_fused_", "aten::_amp_")):
            types = _types_of_written(call)
        else:
            types = self._result_types(twin, args, kwargs)
        outs = _map_types(types, self._value)
        self.nodes.append(Node(twin, args, kwargs, outs, self.origin))
        results = [i for i in _flat(outs) if i is not None]
        fresh = call.outs or []
        n_new = len(list(_flat_specs(fresh)))
        written = results[n_new:] if _new_results_first(operator) else results[: len(results) - n_new]
        new = results[:n_new] if _new_results_first(operator) else results[len(results) - n_new :]
        for target, value in zip(targets, written, strict=True):
            self.write(target, value)
        for spec, value in zip(_flat_specs(fresh), new, strict=True):
            self.define(spec.sid, spec.base, value)

    def _result_types(self, twin: torch._ops.OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Types of what `twin` returns, nested as it returns them."""

        def example(arg: Any) -> Any:
            if isinstance(arg, Ref):
                t = self.types[arg.id]
                return torch.empty(t.shape, dtype=t.dtype, device="meta")
            if isinstance(arg, Scalar):
                return 0.5
            return [example(a) for a in arg] if isinstance(arg, (tuple, list)) else arg

        first_list = next((a for a in args if isinstance(a, tuple) and a and isinstance(a[0], Ref)), None)
        if first_list is not None and twin._schema.name.startswith("aten::_foreach_"):
            dtypes = {self.types[r.id].dtype for r in refs((args, kwargs))}
            if len(dtypes) == 1:  # elementwise on lists of one dtype: every result is typed like the first operand
                return [self.types[r.id] for r in first_list]
        result = twin(*[example(a) for a in args], **{k: example(v) for k, v in kwargs.items()})
        return _map_types(result, lambda t: TensorType(tuple(t.shape), t.dtype))

    # ------------------------------------------------------------------ the end

    def finish(self) -> tuple[StepGraph, tuple[int, ...], tuple[int, ...]]:
        """The graph without dead nodes, and the sids of its inputs and outputs."""
        output_sids = tuple(
            sid for sid in self.current if self.kept[sid] and (sid in self.written or sid not in self.roles)
        )
        input_sids = tuple(self.input_ids)
        index_of_input = {sid: i for i, sid in enumerate(input_sids)}
        outputs = tuple(Output(self.current[sid], index_of_input.get(sid)) for sid in output_sids)
        inputs = tuple(
            Input(self.input_ids[sid], self.roles[sid] == "batch", not self.kept[sid] or sid in self.written)
            for sid in input_sids
        )
        nodes = _without_dead_nodes(self.nodes, {o.id for o in outputs})
        return StepGraph(tuple(self.types), inputs, outputs, nodes, self.n_scalars), input_sids, output_sids


_VIEW_OPS = {
    "permute": aten.permute.default,
    "reshape": aten.reshape.default,
    "slice": aten.slice.Tensor,
    "select": aten.select.int,
    "expand": aten.expand.default,
}


def functionalize(
    calls: list[Call], kept: tuple[bool, ...], roles: dict[int, Role]
) -> tuple[StepGraph, tuple[int, ...], tuple[int, ...]]:
    """The graph of a segment, with the storages (sids) of its inputs and of its outputs."""
    builder = Functionalizer(kept, roles)
    for call in calls:
        builder.call(call)
    return builder.finish()


def _meet(call: Call, targets: list[TensorSpec]) -> bool:
    """Whether a storage that a foreach call writes turns up in it more than once."""
    written = {t.sid for t in targets}
    uses = [s.sid for s in tensor_specs(call) if s.sid in written]
    return len(uses) > len(written)


def _list_arguments(op: torch._ops.OpOverload) -> list[bool]:
    return [isinstance(a.type, torch.ListType) for a in op._schema.arguments]


def _holds_tensors(spec: Any) -> bool:
    return isinstance(spec, TensorSpec) or (isinstance(spec, tuple) and any(_holds_tensors(s) for s in spec))


def _new_results_first(operator: Any) -> bool:
    """Whether an operator returns its new tensors before those that it wrote."""
    return bool(operator.returned) and operator.returned[0] is None


def _flat(outs: Any) -> list[Any]:
    if isinstance(outs, (tuple, list)):
        return [i for o in outs for i in _flat(o)]
    return [outs]


def _flat_specs(outs: Any) -> list[OutSpec]:
    return [o for o in _flat(outs) if isinstance(o, OutSpec)]


def _map_types(result: Any, fn: Any) -> Any:
    """`fn` on every tensor (or type) of a nested result; None stays."""
    if result is None:
        return None
    if isinstance(result, (tuple, list)):
        return tuple(_map_types(r, fn) for r in result)
    return fn(result)


def _types_of_written(call: Call) -> Any:
    """The types of a mutating call's written arguments, nested as its functional twin returns them."""
    assert call.operator is not None
    types = _map_types(
        [call.args[i] for i in call.operator.mutated], lambda spec: TensorType(spec.geometry[0], spec.geometry[3])
    )
    return types[0] if len(types) == 1 else types


def _without_dead_nodes(nodes: list[Node], needed: set[int]) -> tuple[Node, ...]:
    live: list[Node] = []
    needed = set(needed)
    for node in reversed(nodes):
        if any(i in needed for i in _flat(node.outs)):
            live.append(node)
            needed.update(r.id for r in refs(node.args))
            needed.update(r.id for r in refs(node.kwargs))
    live.reverse()
    return tuple(live)
