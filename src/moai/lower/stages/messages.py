"""Each device's own code, with messages for what one makes and another reads.

In: code and its units with their stages. Out: for each device its sections, and where each input and output is.

What is on no stage is made on every device that needs it. Otherwise a value is sent once to each device that reads it,
from where it is made to where it is read first: within a pass upwards with the forward and downwards with the backward.
What one unit needs of another device goes in one message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from moai.graph.step_graph import Ref
from moai.lower.operators import is_view
from moai.lower.program import Instruction
from moai.lower.stages.assign import Assignment, NoCut, Step
from moai.lower.stages.units import Unit, with_lanes


@dataclass
class StageCode:
    """What a device does. `sections`: outside of loops (even) and in loops (odd), by the part of a pass: the forwards
    of the stages that it has, then their backwards the other way round. Outside of loops there is one part. `reads`:
    the inputs that it needs. `outputs`: those of the step's outputs that are made here."""

    sections: list[dict[int, list[Instruction]]]
    reads: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)


@dataclass(frozen=True, order=True)
class _Place:
    """Where in its code a device does something: instructions are ordered by `at`."""

    section: int
    part: int
    at: int


_END = 1 << 60


def exchanged(step: Step, assignment: Assignment, outputs: Mapping[int, int]) -> list[StageCode]:
    """`outputs`: the device that is to have each output. Raises NoCut."""
    return _Exchange(step, assignment, outputs).found


class _Exchange:
    def __init__(self, step: Step, assignment: Assignment, outputs: Mapping[int, int]):
        self._step = step
        self._found = assignment
        self._n = 1 + max((unit.section for unit in step.units), default=0)
        self._n += 1 - self._n % 2
        self._inputs = step.states | step.data | step.passing
        self._maker = {o: k for k, unit in enumerate(step.units) for o in unit.outs}
        self._first: dict[tuple[int, int], _Place] = {}  # (device, value) -> where it is read first
        self._done: dict[tuple[int, _Place], list[Unit]] = defaultdict(list)
        self._sent: set[tuple[int, int]] = set()  # (value, device that it goes to)
        for id_, device in outputs.items():
            self._need(device, id_, _Place(self._n - 1, 0, _END))
        for k in range(len(step.units) - 1, -1, -1):
            self._demand(k)
        self._send_inputs()
        self._messages = self._planned()
        self.found = [self._code(device, outputs) for device in range(step.devices)]

    # -- what is done where

    def _need(self, device: int, id_: int, place: _Place) -> None:
        """`device` reads value `id_`, and perhaps in other places, too."""
        first = self._first.get((device, id_))
        if first is None or place < first:
            self._first[device, id_] = place

    def _do(self, k: int, device: int, part: int) -> None:
        unit = self._step.units[k]
        place = _Place(unit.section, part, unit.at)
        self._done[device, place].append(unit)
        for i in unit.uses:
            self._need(device, i, place)

    def _demand(self, k: int) -> None:
        """Have unit `k` done, all of whose readers have been done already."""
        unit, own = self._step.units[k], self._found.stage[k]
        needed = [device for device in range(self._step.devices) if self._is_needed(device, unit)]
        if own is not None and not self._is_view(unit):
            self._send(unit, own, needed)
            self._do(k, self._step.device(own), self._part(unit, own))
            return
        homes = {home for o in unit.outs for home in self._found.homes(o)}
        if homes and own is None and self._is_smaller(unit):
            home = min(homes)
            self._found.home.update(dict.fromkeys(unit.outs, home))
            self._send(unit, home, needed)
            needed = [self._step.device(home)]
        for device in needed:
            self._do(k, device, self._part_needed(device, unit))

    def _send(self, unit: Unit, home: int, devices: list[int]) -> None:
        """Those of the unit's results that `devices` other than its own read."""
        own = self._step.device(home)
        self._sent.update((o, d) for o in unit.outs for d in devices if d != own and (d, o) in self._first)

    def _is_view(self, unit: Unit) -> bool:
        """Whether it costs nothing to do it where its result is read, so that one message serves several views."""
        op = self._step.code[unit.at].op
        return is_view(op) and len(unit.uses) == 1 and len(unit.outs) == 1

    def _is_smaller(self, unit: Unit) -> bool:
        """Whether it takes less to send what is made of states than to send these."""
        if unit.in_loop:
            return False
        types, leaves = self._step.values.types, self._found.leaves
        states = {i for o in unit.outs for i in leaves[o]}
        return sum(types[o].nbytes for o in unit.outs) < sum(types[i].nbytes for i in states)

    def _is_needed(self, device: int, unit: Unit) -> bool:
        return any((device, o) in self._first for o in unit.outs)

    def _part(self, unit: Unit, stage: int) -> int:
        if not unit.in_loop:
            return 0
        kinds = [self._found.kinds[i] for i in (*unit.outs, *unit.uses)]
        chunk = stage // self._step.devices
        return self._last_part - chunk if "backward" in kinds else chunk

    @property
    def _last_part(self) -> int:
        return 2 * self._step.stages // self._step.devices - 1

    def _part_needed(self, device: int, unit: Unit) -> int:
        """Of what is on no stage: with its first reader."""
        places = [self._first[device, o] for o in unit.outs if (device, o) in self._first]
        return min((p.part for p in places if p.section == unit.section), default=0)

    def _send_inputs(self) -> None:
        """States that are read on other devices than where they live."""
        for id_ in self._inputs:
            home = self._found.home.get(id_)
            if home is None:
                continue
            own = self._step.device(home)
            has = self._step.living.get(id_, (own,))
            for device in range(self._step.devices):
                if device not in has and (device, id_) in self._first:
                    self._sent.add((id_, device))
                    self._need(own, id_, _Place(0, 0, -1))

    # -- the code

    def _code(self, device: int, outputs: Mapping[int, int]) -> StageCode:
        placed: list[tuple[tuple[int, ...], _Place, Instruction]] = []
        for (owner, place), units in self._done.items():
            if owner == device:
                instruction = self._step.code[place.at]
                if units[0].lane is not None:
                    instruction = with_lanes(instruction, [u.lane for u in units if u.lane is not None])
                placed.append(((place.at, 1, 0), place, instruction))
        for number, message in enumerate(self._messages):
            if message.source == device:
                send = Instruction("send", (tuple(map(Ref, message.ids)), message.target, number), {}, None)
                placed.append(((message.sent.at, 2, number), message.sent, send))
            elif message.target == device:
                shapes = tuple(map(self._step.values.local_shape, message.ids))
                what = (message.source, number, shapes, message.dtype)
                receive = Instruction("receive", what, {}, message.ids, (), shapes)
                placed.append(((message.received.at, 0, number), message.received, receive))
        placed.sort(key=lambda entry: entry[0])
        sections: list[dict[int, list[Instruction]]] = [defaultdict(list) for _ in range(self._n)]
        for _, place, instruction in placed:
            sections[place.section][place.part].append(instruction)
        reads = {i for d, i in self._first if d == device and i in self._inputs}
        reads -= {i for i, target in self._sent if target == device}
        return StageCode(sections, reads, {id_ for id_, owner in outputs.items() if owner == device})

    def _planned(self) -> list[_Message]:
        together: dict[tuple[int, int, int, int, _Place, str], list[int]] = defaultdict(list)
        made: dict[int, _Place] = {}
        for id_, target in sorted(self._sent):
            source = self._step.device(self._found.home[id_])
            made[id_] = self._made(id_)
            received = self._received(id_, source, target, made[id_])
            dtype = str(self._step.values.types[id_].dtype)
            together[source, target, made[id_].section, made[id_].part, received, dtype].append(id_)
        types = self._step.values.types
        return [
            _Message(key[0], key[1], max(made[i] for i in ids), key[4], tuple(ids), types[ids[0]].dtype)
            for key, ids in sorted(together.items())
        ]

    def _made(self, id_: int) -> _Place:
        """Where a value can be sent: a sum over passes is there behind its loop."""
        k = self._maker.get(id_)
        if k is None:
            return _Place(0, 0, -1)
        unit = self._step.units[k]
        if self._step.code[unit.at].op == "accumulate":
            return _Place(unit.section + 1, 0, -1)
        return _Place(unit.section, self._part(unit, self._found.home[id_]), unit.at)

    def _received(self, id_: int, source: int, target: int, made: _Place) -> _Place:
        """Before it is read first; of what is sent outside of loops, not in one."""
        first = self._first[target, id_]
        if first.section != made.section:
            return _Place(made.section, made.part, _END)
        if made.section % 2 and self._turn(target, first.part) < self._turn(source, made.part):
            # In the forward, later stages wait for earlier ones: a message the other way would never come.
            raise NoCut(f"stage {target} needs something of stage {source} before it has done its part")
        return first

    def _turn(self, device: int, part: int) -> int:
        """When a device does a part, among all parts of a pass on all devices."""
        n = self._step.devices
        forward = part <= self._last_part // 2
        return part * n + device if forward else (part + 1) * n - 1 - device


@dataclass(frozen=True)
class _Message:
    """`sent` and `received`: behind which instruction, and before which."""

    source: int
    target: int
    sent: _Place
    received: _Place
    ids: tuple[int, ...]
    dtype: torch.dtype
