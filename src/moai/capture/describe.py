"""Describing a call that has not been seen at its place before: specs of its arguments and of what it makes.

In: an operator's arguments and its results' shapes. Out: what a `Call` of the tree keeps of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from moai.capture import meta, provenance
from moai.capture.geometry import contiguous_stride
from moai.capture.operators import Operator
from moai.capture.segment import OpenSegment, all_floats
from moai.capture.trace import Call, FloatSpec, FloatsSpec, OutSpec, Seed, SeedSpec, TensorSpec
from moai.capture.values import Record, geometry_of, record_of

Maker = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Callable[[], tuple[torch.Tensor, Record]]]


def specify(segment: OpenSegment, arg: Any, floats_vary: bool) -> Any:
    """The spec of an argument (and of each member of a list); binds storages that come in here."""
    if isinstance(arg, torch.Tensor):
        record = record_of(arg)
        if record.epoch == segment.epoch:
            return TensorSpec(record.sid, geometry_of(arg), None)
        segment.bind(record)
        return TensorSpec(record.sid, geometry_of(arg), record.base)
    if type(arg) is float:
        spec = FloatSpec(arg, floats_vary)
        if spec.varies:
            segment.scalars.append(arg)
        return spec
    if type(arg) is Seed:
        segment.scalars.append(int(arg))
        return SeedSpec()
    if isinstance(arg, (list, tuple)):
        if arg and floats_vary and all_floats(arg):
            segment.scalars.extend(arg)
            return FloatsSpec(len(arg))
        if any(isinstance(a, (torch.Tensor, float, list, tuple)) for a in arg):
            return tuple(specify(segment, a, floats_vary) for a in arg)
        return list(arg)
    if isinstance(arg, torch.SymInt):
        return int(arg)
    return arg


def specify_outputs(operator: Operator, result: Any, first_sid: int, make: Maker) -> Any:
    """OutSpecs for the new tensors of a call (for a mutating one: a list of those only), numbered from `first_sid`."""
    count = [first_sid]
    if operator.mutated:
        results = result if isinstance(result, tuple) else (result,)
        new = [r for r, i in zip(results, operator.returned, strict=False) if i is None]
        return [_out_spec(r, count, make) for r in new] or None
    return _out_spec(result, count, make)


def _out_spec(result: Any, count: list[int], make: Maker) -> Any:
    if result is None:
        return None
    if isinstance(result, torch.Tensor):
        size, stride = tuple(result.size()), result.stride()
        if not meta.is_dense(size, stride):
            stride = contiguous_stride(size)
        base = (size, stride, result.dtype)
        spec = OutSpec(count[0], base, make(*base))
        count[0] += 1
        return spec
    return type(result)(_out_spec(r, count, make) for r in result)


def widened_twin(call: Call) -> Call | None:
    """If a sibling differs in nothing but constant floats: make those inputs of the graph, and return it. What was
    compiled with the constants is forgotten."""
    assert call.parent is not None
    for sibling in call.parent.children:
        if sibling.operator is call.operator and _equal_but_floats(
            (sibling.args, sibling.kwargs), (call.args, call.kwargs), widen=False
        ):
            _equal_but_floats((sibling.args, sibling.kwargs), (call.args, call.kwargs), widen=True)
            _forget_compiled(sibling)
            return sibling
    return None


def explain_departure(cursor: Call, operator: Operator, args: tuple[Any, ...]) -> str:
    """What the script did instead of what it did last time after `cursor`, and where."""
    expected = cursor.children[0].operator
    what = (
        f"{operator.name} instead of {expected}"
        if expected is not operator
        else f"{operator.name} with other arguments"
    )
    shapes = ", ".join(str(list(a.shape)) for a in args if isinstance(a, torch.Tensor))
    return f"{what}{f' (shapes {shapes})' if shapes else ''}{provenance.in_script()}"


def resize_outputs(operator: Operator, kwargs: dict[str, Any], result: Any) -> None:
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
