"""Stretches: what a function did to the recorder, done again at once without calling it.

In: what a `Tape` notes while a function runs from the beginning of a segment, without gradients. Out: a `Stretch`, with
which the recorder gets to where it was then: the host's numbers are computed again, storages come in, results are made.

That the function would do the same again is its caller's to know; here it is seen that what comes in is as it was. A
function that does more than a stretch can repeat (it reads a value, uploads something, draws random numbers, keeps a
result for itself) gives none.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from moai.capture import host_eval
from moai.capture.operators import Operator
from moai.capture.trace import Call, OutSpec, count_numbers, out_specs, written_specs
from moai.capture.values import Base, Geometry, Record, Role, Value, geometry_of, record_of

if TYPE_CHECKING:
    from moai.capture.recorder import Recorder


# Refers to a record that is gone.
_DEAD = weakref.ref(Record(((), (), torch.float32)))


@dataclass(frozen=True, slots=True)
class _Source:
    """A storage that a stretch takes in or makes on the host: argument `index`, `record` (there since before), or, if
    neither is set, what a step on the host makes, with this `base` and `role`."""

    base: Base
    role: Role
    index: int = -1
    record: Record | None = None

    @property
    def is_made(self) -> bool:
        """Whether the host makes it."""
        return self.index < 0 and self.record is None


@dataclass(frozen=True, slots=True)
class _Window:
    """A tensor among a host step's arguments: the `slot`-th source, through `geometry` (None: all of it)."""

    slot: int
    geometry: Geometry | None


@dataclass(frozen=True, slots=True)
class _Step:
    """A call on the host. Its result is source `out`; `writes`: its first argument is, and is written."""

    op: Callable[..., Any]
    args: Any
    kwargs: Any
    out: int
    writes: bool


@dataclass(frozen=True, slots=True)
class _Bind:
    """The `slot`-th source comes into the segment as storage `sid`, which the segment writes or not."""

    sid: int
    slot: int
    written: bool


class Tape:
    """What a function does to the recorder while it runs. `spoiled` says why it cannot be repeated, if so."""

    def __init__(self, recorder: Recorder, arguments: Sequence[torch.Tensor]) -> None:
        self.spoiled = ""
        self._recorder = recorder
        self._segment = recorder.segment
        self._arguments = [record_of(x) for x in arguments]
        self._shapes = [_described(x) for x in arguments]
        self._sources: list[_Source] = []
        self._slots: dict[int, int] = {}  # by the record's id
        self._records: list[Record] = []  # keeps these ids from being given again
        self._actions: list[_Step | _Bind] = []
        self._n_inputs = 0
        if self._segment.cursor is not recorder.root or self._segment.alive or self._segment.optimizer_done:
            self.spoil("it begins in the middle of a segment")
        if len(set(map(id, self._arguments))) < len(self._arguments):
            self.spoil("two of its arguments share their memory")

    def spoil(self, why: str) -> None:
        """The function did what a stretch cannot do."""
        self.spoiled = self.spoiled or why

    def computed(self, operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """The host computed a call."""
        if self.spoiled:
            return
        if not isinstance(result, torch.Tensor):
            self.spoil(f"the host computed {operator.name}, which has several results")
            return
        self._take_in()
        writes = bool(operator.mutated)
        given = self._templates(args), {k: self._templates(v) for k, v in kwargs.items()}
        slot = self._slot(record_of(result)) if writes else self._made(result)
        if writes and self._sources[slot].index >= 0:
            self.spoil("it writes to its arguments")
        self._actions.append(_Step(operator.op, *given, slot, writes))

    def parted(self, whole: torch.Tensor, part: torch.Tensor) -> None:
        """A part of numbers at hand became a tensor of its own."""
        if not self.spoiled:
            self._take_in()
            given = (self._templates(whole),)
            self._actions.append(_Step(torch.clone, given, {}, self._made(part), False))

    def finish(self, results: Sequence[torch.Tensor]) -> Stretch | None:
        """What the function did, if it returned and made these tensors. To be called once, when it has returned."""
        if self._recorder.segment is not self._segment:
            self.spoil("the segment ended")
        if self.spoiled:
            return None
        self._take_in()
        calls = self._segment.cursor.path()
        if not calls or any(count_numbers((c.args, tuple(c.kwargs.values()))) for c in calls):
            self.spoil("it is empty, or takes numbers that are new at every run")
        made = {spec.sid: (spec, call) for call in calls for spec in out_specs(call.outs)}
        found = [(record_of(x), geometry_of(x)) for x in results]
        if any(r.epoch != self._segment.epoch or r.sid not in made for r, _ in found):
            self.spoil("it returns what it has not made")
        returned = {r.sid for r, _ in found}
        hosts = [weakref.ref(r) for r, s in zip(self._records, self._sources, strict=True) if s.is_made]
        self._records.clear()
        kept = [self._segment.alive[sid] for sid in made if sid not in returned] + hosts
        if any(ref() is not None for ref in kept):
            self.spoil("it keeps a tensor that it has made")
        if self.spoiled:
            return None
        written = {spec.sid for call in calls for spec in written_specs(call)}
        actions = [replace(a, written=a.sid in written) if isinstance(a, _Bind) else a for a in self._actions]
        outs = [(*made[record.sid], geometry) for record, geometry in found]
        return Stretch(self._shapes, self._sources, actions, calls, outs, len(self._segment.alive))

    def _take_in(self) -> None:
        """Note the storages that have come into the segment."""
        segment = self._segment
        for sid, _ in segment.inputs[self._n_inputs :]:
            record = segment.alive[sid]()
            if record is None:
                self.spoil("it takes in a tensor that is gone")
            else:
                self._actions.append(_Bind(sid, self._slot(record), False))
        self._n_inputs = len(segment.inputs)

    def _slot(self, record: Record) -> int:
        known = self._slots.get(id(record))
        if known is None:
            assert record.value is not None
            index = next((i for i, r in enumerate(self._arguments) if r is record), -1)
            source = _Source(record.base, record.value.role, index, None if index >= 0 else record)
            known = self._add(record, source)
        return known

    def _made(self, result: torch.Tensor) -> int:
        record = record_of(result)
        assert record.value is not None
        return self._add(record, _Source(record.base, record.value.role))

    def _add(self, record: Record, source: _Source) -> int:
        self._slots[id(record)] = slot = len(self._sources)
        self._sources.append(source)
        self._records.append(record)
        return slot

    def _templates(self, value: Any) -> Any:
        """Arguments with a `_Window` in the place of every accelerator tensor."""
        if isinstance(value, torch.Tensor):
            if value.device.type == "cpu":
                self.spoil("it computes with a tensor on the CPU")
                return value
            record, geometry = record_of(value), geometry_of(value)
            size, stride, dtype = record.base
            if geometry[3] != dtype:
                self.spoil("it looks at whole numbers as if they were others")
            return _Window(self._slot(record), None if geometry == (size, stride, 0, dtype) else geometry)
        if isinstance(value, (list, tuple)):
            return type(value)(self._templates(v) for v in value)
        return host_eval.on_host(value, torch.clone)


class Stretch:
    """See the module docstring. `external`: the records that it takes in beside its arguments."""

    def __init__(
        self,
        arguments: list[Any],
        sources: list[_Source],
        actions: list[_Step | _Bind],
        calls: list[Call],
        results: list[tuple[OutSpec, Call, Geometry]],
        n_storages: int,
    ) -> None:
        self._arguments = arguments
        self._sources = sources
        self._actions = actions
        self._end = calls[-1]
        self._n_calls = len(calls)
        self._results = results
        self._alive = [_DEAD] * n_storages
        # What the host computes with must still be there.
        hosts = {w.slot for a in actions if isinstance(a, _Step) for w in _windows((a.args, tuple(a.kwargs.values())))}
        self._host_slots = sorted(slot for slot in hosts if not sources[slot].is_made)
        self.external = [s.record for s in sources if s.record is not None]

    def same(self, other: Stretch) -> bool:
        """Whether both do the same, with the same numbers."""
        ours = self._end, self._arguments, self._sources, self._actions, self._results
        return ours == (other._end, other._arguments, other._sources, other._actions, other._results)

    def again(self, recorder: Recorder, arguments: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """The results, as if the function had been called. None, and nothing is done, if what comes in is not as it
        was."""
        segment = recorder.segment
        if segment.cursor is not recorder.root or segment.alive or segment.optimizer_done:
            return None
        if [_described(x) for x in arguments] != self._arguments:
            return None
        given = [record_of(x) for x in arguments]
        records = [given[s.index] if s.index >= 0 else s.record for s in self._sources]
        taken = [r for r in records if r is not None]
        if len(set(map(id, taken))) < len(taken) or any(r.value is None for r in taken):
            return None
        for slot in self._host_slots:
            record, source = records[slot], self._sources[slot]
            assert record is not None and record.value is not None
            if record.value.host is None or record.value.role != source.role:
                return None
        self._act(recorder, records)
        recorder.stats.replayed += self._n_calls
        segment.cursor = self._end
        return self._make_results(segment)

    def _act(self, recorder: Recorder, records: list[Record | None]) -> None:
        segment = recorder.segment
        epoch = segment.epoch
        segment.alive = self._alive.copy()
        sources = self._sources
        values: list[Value | None] = [r.value if r is not None else None for r in records]
        with torch.no_grad():
            for action in self._actions:
                if isinstance(action, _Bind):
                    record, value = records[action.slot], values[action.slot]
                    assert value is not None
                    segment.inputs.append((action.sid, value))
                    if record is not None:
                        record.usage.used = True
                        record.epoch, record.sid = epoch, action.sid
                        if action.written:
                            record.written = epoch
                        segment.alive[action.sid] = weakref.ref(record)
                else:
                    source = sources[action.out]
                    host = _run(action, values, source.base)
                    values[action.out] = value = Value(host=host, role=source.role)
                    record = records[action.out]
                    if record is not None:  # written: from here on it is another input
                        record.value, record.epoch = value, -1

    def _make_results(self, segment: Any) -> list[torch.Tensor]:
        made: dict[int, torch.Tensor] = {}
        results = []
        for spec, call, (size, stride, offset, dtype) in self._results:
            if spec.sid not in made:
                tensor, record = spec.make()
                record.epoch = record.written = segment.epoch
                record.sid = spec.sid
                record.made_by = call
                segment.alive[spec.sid] = weakref.ref(record)
                made[spec.sid] = tensor
            tensor = made[spec.sid]
            whole = (size, stride, dtype) == spec.base and not offset
            results.append(tensor if whole else tensor.as_strided(size, stride, offset))
        return results


def _run(step: _Step, values: list[Value | None], base: Base) -> torch.Tensor:
    """The content of the storage that a step makes or writes."""
    size, stride, dtype = base
    if step.writes:
        target = step.args[0]
        held = values[target.slot]
        assert held is not None and held.host is not None
        host = torch.empty_strided(size, stride, dtype=dtype).copy_(held.host)
        window = host if target.geometry is None else host.as_strided(*target.geometry[:3])
        step.op(window, *_filled(step.args[1:], values), **{k: _filled(v, values) for k, v in step.kwargs.items()})
        return host
    host = step.op(*_filled(step.args, values), **{k: _filled(v, values) for k, v in step.kwargs.items()})
    if host.stride() == stride:
        return host
    return torch.empty_strided(size, stride, dtype=dtype).copy_(host)


def _filled(template: Any, values: list[Value | None]) -> Any:
    if type(template) is _Window:
        held = values[template.slot]
        assert held is not None and held.host is not None
        return held.host if template.geometry is None else held.host.as_strided(*template.geometry[:3])
    if type(template) in (list, tuple):
        return type(template)([_filled(t, values) for t in template])
    return template


def _windows(template: Any) -> Iterable[_Window]:
    if type(template) is _Window:
        yield template
    elif type(template) in (list, tuple):
        for t in template:
            yield from _windows(t)


def _described(tensor: torch.Tensor) -> Any:
    """What an argument must have in common with that of the first time."""
    record = record_of(tensor)
    value = record.value
    return geometry_of(tensor), record.base, value is not None and (value.role, value.host is not None)
