"""The segment that is being recorded: where it stands in the tree of calls, and the storages and numbers it has met.

In: arguments of calls. Out: whether they are those of a call seen before; the tensors that a call makes. Every call of
a step that repeats comes through here, so it is written for speed.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from moai.capture import provenance
from moai.capture.trace import Call, FloatSpec, FloatsSpec, OutSpec, Seed, SeedSpec, TensorSpec
from moai.capture.values import Record, Value


class OpenSegment:
    """`cursor` is the last call. By number in the segment (sid): `alive`, the storages; `inputs`, those that were there
    before, with what they held. `scalars` are the run's numbers in order, `held` tensors that must not die before the
    segment ends. `departure` says where the script left what was known."""

    __slots__ = ("alive", "cursor", "departure", "epoch", "held", "inputs", "optimizer_done", "scalars")

    def __init__(self, root: Call, epoch: int) -> None:
        self.cursor = root
        self.epoch = epoch
        self.alive: list[weakref.ref[Record]] = []
        self.inputs: list[tuple[int, Value]] = []
        self.scalars: list[float | int] = []
        self.held: list[torch.Tensor] = []
        self.optimizer_done = False
        self.departure = ""

    def matches(self, specs: Any, args: Any) -> bool:
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
                    self.bind(record)
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
                if type(arg) not in (list, tuple) or not self.matches(spec, arg):
                    return False
            elif kind is FloatsSpec:
                if type(arg) not in (list, tuple) or len(arg) != spec.length or not all_floats(arg):
                    return False
                self.scalars.extend(arg)
            elif kind is SeedSpec:
                if type(arg) is not Seed:
                    return False
                self.scalars.append(int(arg))
            elif type(arg) is not kind or arg != spec:
                return False
        return True

    def matches_keywords(self, specs: dict[str, Any], kwargs: dict[str, Any]) -> bool:
        if len(specs) != len(kwargs):
            return False
        try:
            return self.matches(list(specs.values()), [kwargs[k] for k in specs])
        except KeyError:
            return False

    def bind(self, record: Record) -> None:
        """Take a storage from before the segment in as the next storage of the segment."""
        value = record.value
        if value is None:
            raise RuntimeError(missing_text(record))
        record.usage.used = True
        record.epoch = self.epoch
        record.sid = len(self.alive)
        self.alive.append(weakref.ref(record))
        self.inputs.append((record.sid, value))

    def unbind(self, n_inputs: int, n_scalars: int) -> None:
        """Take back what a failed match bound."""
        for sid, _ in self.inputs[n_inputs:]:
            record = self.alive[sid]()
            if record is not None:
                record.epoch = -1
        if len(self.inputs) > n_inputs:
            del self.alive[self.inputs[n_inputs][0] :]
            del self.inputs[n_inputs:]
        del self.scalars[n_scalars:]

    def output(self, call: Call) -> torch.Tensor:
        """The new tensor of a call with one result (most calls)."""
        spec = call.outs
        tensor, record = spec.make()
        record.epoch = record.written = self.epoch
        record.sid = spec.sid
        record.made_by = call
        self.alive.append(weakref.ref(record))
        return tensor

    def nested(self, outs: Any) -> Any:
        if outs is None:
            return None
        if isinstance(outs, OutSpec):
            tensor, record = outs.make()
            record.epoch = record.written = self.epoch
            record.sid = outs.sid
            record.made_by = self.cursor
            self.alive.append(weakref.ref(record))
            return tensor
        return type(outs)(self.nested(o) for o in outs)

    def written(self, call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
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
        fresh = iter(self.nested(call.outs) or ())
        results = [next(fresh) if i is None else targets[i] for i in operator.returned]
        if len(results) == 1:
            return results[0]
        return tuple(results) if results else None


def all_floats(items: Any) -> bool:
    """Whether all items are Python floats."""
    return all(type(i) is float for i in items)


def missing_text(record: Record) -> str:
    """Why a storage has no value, for the person who wanted it."""
    text, where = record.lost or "This accelerator tensor never received a value.", provenance.in_script()
    return f"{text} It was used{where}." if where else text
