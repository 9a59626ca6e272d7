"""Working things out on the host: small values whose inputs are at hand, and operators whose result has no shape of
its own.

In: the recorder's pending calls. Out: CPU tensors. The calls run as they were recorded, mutations and views included,
on copies of the inputs. A read that is answered here does not end the segment.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from moai.capture.geometry import numel
from moai.capture.operators import Operator
from moai.capture.segment import OpenSegment
from moai.capture.trace import (
    Call,
    FloatSpec,
    FloatsSpec,
    OutSpec,
    Seed,
    SeedSpec,
    TensorSpec,
    count_numbers,
    out_specs,
    tensor_specs,
    written_specs,
)
from moai.capture.values import Base, Record, Value

logger = logging.getLogger("moai")

# Positions of a step of 8,192 samples of 2,048 tokens, which take the host a tenth of a second, and the devices longer.
MAX_ELEMENTS = 1 << 24
# The devices' business, whatever the size: long work for few elements, and random numbers, which a GPU draws otherwise.
FOR_DEVICES = frozenset(
    f"{name}.default"
    for name in (
        "aten.mm",
        "aten.bmm",
        "aten.addmm",
        "aten.baddbmm",
        "aten.convolution",
        "moai.sdpa",
        "moai.sdpa_backward",
        "moai.random",
        "moai.randperm",
        "moai.multinomial",
    )
)
_CPU = torch.device("cpu")
_said: set[str] = set()


def evaluate(segment: OpenSegment, record: Record, max_calls: int) -> torch.Tensor | None:
    """The pending value of a storage (in its base geometry), or None where it takes more than `max_calls` operators,
    tensors beyond MAX_ELEMENTS, or inputs that are on the devices only."""
    end = segment.cursor
    if record.sid not in end.needed:
        end.needed[record.sid] = _needed_calls(end, record.sid, max_calls)
    calls = end.needed[record.sid]
    if calls is None:
        return None
    values = dict(segment.inputs)
    bases: dict[int, torch.Tensor] = {}
    numbers = _numbers_by_call(segment, calls)
    with torch.no_grad():
        for call in calls:
            for spec in tensor_specs(call):
                if spec.sid not in bases:
                    base = _host_base(values[spec.sid], spec.fresh) if spec.sid in values else None
                    if base is None:
                        return None
                    bases[spec.sid] = base
            if any(o.type.numel > MAX_ELEMENTS for o in out_specs(call.outs)):
                return None
            _run(call, bases, numbers[id(call)])
    return bases[record.sid]


def _host_base(value: Value, base: Base | None) -> torch.Tensor | None:
    """A copy of an input's content, if it is at hand and small."""
    if value.role == "undefined" and base is not None:
        size, stride, dtype = base
        return torch.empty_strided(size, stride, dtype=dtype).zero_() if numel(size) <= MAX_ELEMENTS else None
    if value.host is None or value.host.numel() > MAX_ELEMENTS:
        return None
    return value.host.clone()


def _needed_calls(end: Call, sid: int, limit: int) -> list[Call] | None:
    """The calls before `end` (inclusive) that storage `sid` depends on, in order; None beyond the limit, or with work
    for the devices. What is asked behind a forward pass may be about its inputs alone, so all of the segment is looked
    at: once, as the next step asks at the same place."""
    needed, calls, node = {sid}, [], end
    while node.operator is not None:
        written = {s.sid for s in written_specs(node)} | {o.sid for o in out_specs(node.outs)}
        if written & needed:
            calls.append(node)
            needed |= {s.sid for s in tensor_specs(node)}
            if node.operator.name in FOR_DEVICES:
                return None
        if len(calls) > limit:
            return None
        assert node.parent is not None
        node = node.parent
    calls.reverse()
    return calls


def _numbers_by_call(segment: OpenSegment, calls: list[Call]) -> dict[int, list[float | int]]:
    """The numbers of this run that each of `calls` took."""
    taken: dict[int, list[float | int]] = {id(c): [] for c in calls}
    if not any(map(_count_numbers, calls)):
        return taken
    start = 0
    for call in segment.cursor.path():
        n = _count_numbers(call)
        if id(call) in taken:
            taken[id(call)] = segment.scalars[start : start + n]
        start += n
    return taken


def _count_numbers(call: Call) -> int:
    return count_numbers(call.args) + count_numbers(tuple(call.kwargs.values()))


def _run(call: Call, bases: dict[int, torch.Tensor], numbers: list[float | int]) -> None:
    """Run one recorded call on the host tensors in `bases`; its new storages are added there."""
    remaining = iter(numbers)

    def value(spec: Any) -> Any:
        if isinstance(spec, TensorSpec):
            size, stride, offset, dtype = spec.geometry
            base = bases[spec.sid]
            if dtype == base.dtype:
                return base.as_strided(size, stride, offset)
            return torch.empty(0, dtype=dtype).set_(base.untyped_storage(), offset, size, stride)
        if isinstance(spec, FloatSpec):
            return next(remaining) if spec.varies else spec.value
        if isinstance(spec, SeedSpec):
            return next(remaining)
        if isinstance(spec, FloatsSpec):
            return [next(remaining) for _ in range(spec.length)]
        if isinstance(spec, tuple):
            return [value(s) for s in spec]
        return _CPU if isinstance(spec, torch.device) else spec

    operator = call.operator
    assert operator is not None
    args = [value(s) for s in call.args]
    kwargs = {k: value(s) for k, s in call.kwargs.items()}
    result = operator.op(*args, **kwargs)
    results = result if isinstance(result, (list, tuple)) else [result]
    if operator.mutated:
        results = [r for r, i in zip(results, operator.returned, strict=False) if i is None]
    _store(call.outs if isinstance(call.outs, (list, tuple)) else [call.outs], results, bases)


def _store(outs: Any, results: Any, bases: dict[int, torch.Tensor]) -> None:
    for out, result in zip(outs, results, strict=False):
        if isinstance(out, OutSpec):
            base = torch.empty_strided(*_layout(out), dtype=out.type.dtype)
            bases[out.sid] = base.copy_(result)
        elif out is not None:
            _store(out, result, bases)


def _layout(out: OutSpec) -> tuple[tuple[int, ...], tuple[int, ...]]:
    size, stride, _ = out.base
    return size, stride


def run_on_host(
    operator: Operator,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    read: Callable[[torch.Tensor], torch.Tensor],
    upload: Callable[[torch.Tensor], torch.Tensor],
) -> Any:
    """Run a call at once on the host, with its inputs read and its results uploaded: for operators whose result's shape
    depends on data, or that write and have no functional form. A wrong call gets torch's own error here."""
    if operator.name not in _said:
        _said.add(operator.name)
        logger.debug("%s does not fit into a graph of known shapes without writes; it runs on the host.", operator.name)

    def up(result: Any) -> Any:
        if isinstance(result, torch.Tensor):
            return upload(result)
        if isinstance(result, (list, tuple)):
            return type(result)(up(r) for r in result)
        return result

    host_args, host_kwargs = on_host(args, read), on_host(kwargs, read)
    with torch.no_grad():
        result = operator.op(*host_args, **host_kwargs)
    if not operator.mutated:
        return up(result)
    targets = []
    for i, name in zip(operator.mutated, operator.mutated_names, strict=True):
        target, new = (args[i], host_args[i]) if i < len(args) else (kwargs[name], host_kwargs[name])
        targets.append(target)
        for t, n in zip(target, new, strict=True) if isinstance(target, (list, tuple)) else [(target, new)]:
            if t.shape != n.shape:
                t.resize_(n.shape)
            t.copy_(n)
    returned = result if isinstance(result, tuple) else (result,)
    results = [up(r) if i is None else targets[i] for r, i in zip(returned, operator.returned, strict=False)]
    return results[0] if len(results) == 1 else tuple(results) or None


def on_host(value: Any, read: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Arguments as the host's kernels take them."""
    if isinstance(value, torch.Tensor):
        return value if value.device.type == "cpu" else read(value)
    if isinstance(value, (list, tuple)):
        return [on_host(v, read) for v in value]
    if isinstance(value, dict):
        return {k: on_host(v, read) for k, v in value.items()}
    if isinstance(value, Seed):
        return int(value)
    return _CPU if isinstance(value, torch.device) else value
