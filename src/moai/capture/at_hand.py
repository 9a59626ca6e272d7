"""Whole numbers at hand: small tensors of them are computed at once, on the host.

In: a call without gradients on integers and booleans whose values the host has. Out: its result, as if it had been
uploaded.

The tokens so far, their positions and their masks have other shapes after every token of a text, and none of them is
work for devices. Computed here they are no part of a step, which then is the same for every token. Where tokens are
joined to those that the devices have just chosen, the segment ends, and these are fetched.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from moai.capture import host_eval, meta
from moai.capture.operators import Operator
from moai.capture.values import Record, Role, Value, geometry_of, record_of

if TYPE_CHECKING:
    from moai.capture.recorder import Recorder

UNKNOWN = object()
MAX_ELEMENTS = 1 << 16
_JOINS = frozenset({"aten.cat.default"})
_WHOLE = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})


def may_be(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A quick look: most calls are about something else."""
    first = args[0] if args else None
    if type(first) in (list, tuple) and first:
        first = first[0]
    return (first.dtype if isinstance(first, torch.Tensor) else kwargs.get("dtype")) in _WHOLE


def compute(recorder: Recorder, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The result of a call; UNKNOWN if it is to be recorded."""
    if not operator.name.startswith("aten.") or operator.name in host_eval.FOR_DEVICES or operator.is_out_variant:
        return UNKNOWN
    given = list(tensors((*args, *kwargs.values())))
    if any(t.dtype not in _WHOLE or t.numel() > MAX_ELEMENTS for t in given):
        return UNKNOWN
    if kwargs.get("dtype") not in _WHOLE and (not given or kwargs.get("dtype") is not None):
        return UNKNOWN
    made = meta.infer(operator, args, kwargs)
    if made is meta.UNKNOWN:
        recorder.spoil_tape(f"the shape of what {operator.name} makes depends on data")
    if any(t.numel() > MAX_ELEMENTS or t.dtype not in _WHOLE for t in tensors((made,))):
        return UNKNOWN
    records = [record_of(t) for t in given if t.device.type != "cpu"]
    elsewhere = [r for r in records if not _is_at_hand(recorder, r)]
    if elsewhere:
        if operator.name not in _JOINS or len(elsewhere) == len(records):
            return UNKNOWN
        _fetch(recorder, elsewhere)
    if operator.mutated:
        result = _written(recorder, operator, args, kwargs)
    else:
        role = _role(records)
        make = functools.partial(recorder.upload_result, role=role)
        result = host_eval.run_on_host(operator, args, kwargs, recorder.content, make)
    if recorder.tape is not None and result is not UNKNOWN:
        recorder.tape.computed(operator, args, kwargs, result)
    return result


def alone(recorder: Recorder, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments of a call for devices, where a part of some numbers at hand is a tensor of its own: the last token
    of a text is the same, however long that is."""
    for k, arg in enumerate(args):
        if isinstance(arg, torch.Tensor) and arg.dtype in _WHOLE and arg.numel() <= MAX_ELEMENTS:
            record = record_of(arg) if arg.device.type != "cpu" else None
            if record is not None and arg.size() != record.base[0] and _is_at_hand(recorder, record):
                part = recorder.upload_result(recorder.content(arg), _role((record,)))
                if recorder.tape is not None:
                    recorder.tape.parted(arg, part)
                args = (*args[:k], part, *args[k + 1 :])
    return args


def _role(records: Iterable[Record]) -> Role:
    return "batch" if any(r.value is not None and r.value.role == "batch" for r in records) else "state"


def tensors(values: Any) -> Iterator[torch.Tensor]:
    """Those in a call's arguments, lists included."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors(value)


def _is_at_hand(recorder: Recorder, record: Record) -> bool:
    value = record.value
    if record.written == recorder.segment.epoch or value is None:
        return False
    return value.host is not None or value.role == "undefined"


def _fetch(recorder: Recorder, records: list[Record]) -> None:
    recorder.spoil_tape("it waits for what the devices compute")
    if any(r.written == recorder.segment.epoch for r in records):
        recorder.flush()
    for record in records:
        recorder.keep_on_host(record)


def _written(recorder: Recorder, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call that writes to its first argument, and returns it."""
    target = args[0]
    if operator.mutated != (0,) or not isinstance(target, torch.Tensor) or target.device.type == "cpu":
        return UNKNOWN
    record = record_of(target)
    size, stride, dtype = record.base
    window = geometry_of(target)
    if window[3] != dtype or record.value is None:
        return UNKNOWN
    base = torch.empty_strided(size, stride, dtype=dtype)
    with torch.no_grad():
        base.copy_(record.value.host) if record.value.host is not None else base.zero_()
        others = host_eval.on_host(args[1:], recorder.content)
        operator.op(base.as_strided(*window[:3]), *others, **host_eval.on_host(kwargs, recorder.content))
    role = _role((record,))
    # What the segment has taken in is what was there before: from here on it is another input.
    record.value, record.epoch = Value(host=base, role=role), -1
    return target
