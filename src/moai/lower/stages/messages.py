"""Each stage's own code, with messages for what one stage makes and another reads.

In: code and its units with their stages. Out: for each stage its sections, and where each input and output is.

What is on no stage is made on every one that needs it. Otherwise a value is sent once to each stage that reads it:
within a pass upwards with the forward and downwards with the backward; outside of loops where it is made. What one
unit needs of another stage goes in one message.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch

from moai.graph.step_graph import Ref
from moai.lower.operators import is_view
from moai.lower.program import Instruction
from moai.lower.stages.assign import Assignment, NoCut, Step
from moai.lower.stages.units import Unit, with_lanes

# The part of a pass that something belongs to. Outside of loops all is "whole".
Part = Literal["whole", "forward", "backward"]


@dataclass
class StageCode:
    """`sections`: outside of loops (even) and in loops (odd), by part. `reads`: the inputs that the stage needs.
    `outputs`: those of the step's outputs that are made here."""

    sections: list[dict[Part, list[Instruction]]]
    reads: set[int] = field(default_factory=set)
    outputs: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class _Place:
    """Where in its code a stage does something: instructions are ordered by `at`."""

    section: int
    part: Part
    at: int


_END = 1 << 60


def exchanged(step: Step, assignment: Assignment, outputs: Mapping[int, int]) -> list[StageCode]:
    """`outputs`: the stage that is to have each output. Raises NoCut."""
    return _Exchange(step, assignment, outputs).found


class _Exchange:
    def __init__(self, step: Step, assignment: Assignment, outputs: Mapping[int, int]):
        self._step = step
        self._found = assignment
        self._n = 1 + max((unit.section for unit in step.units), default=0)
        self._n += 1 - self._n % 2
        self._inputs = step.states | step.data | step.passing
        self._maker = {o: k for k, unit in enumerate(step.units) for o in unit.outs}
        self._first: dict[tuple[int, int], _Place] = {}  # (stage, value) -> where it is read first
        self._done: dict[tuple[int, _Place], list[Unit]] = defaultdict(list)
        self._sent: set[tuple[int, int]] = set()  # (value, stage that it goes to)
        for id_, stage in outputs.items():
            self._need(stage, id_, _Place(self._n - 1, "whole", _END))
        for k in range(len(step.units) - 1, -1, -1):
            self._demand(k)
        self._send_inputs()
        self._messages = self._planned()
        self.found = [self._code(stage, outputs) for stage in range(step.stages)]

    # -- what is done where

    def _need(self, stage: int, id_: int, place: _Place) -> None:
        """`stage` reads value `id_`, and perhaps in other places, too."""
        first = self._first.get((stage, id_))
        if first is None or _key(place) < _key(first):
            self._first[stage, id_] = place

    def _do(self, k: int, stage: int, part: Part) -> None:
        unit = self._step.units[k]
        place = _Place(unit.section, part, unit.at)
        self._done[stage, place].append(unit)
        for i in unit.uses:
            self._need(stage, i, place)

    def _demand(self, k: int) -> None:
        """Have unit `k` done, all of whose readers have been done already."""
        unit, own = self._step.units[k], self._found.stage[k]
        if own is not None and not self._is_view(unit):
            readers = [s for s in range(self._step.stages) if s != own and self._is_needed(s, unit)]
            for stage in readers:
                self._sent.update((o, stage) for o in unit.outs if (stage, o) in self._first)
            self._do(k, own, self._part(unit))
            return
        needed = [stage for stage in range(self._step.stages) if self._is_needed(stage, unit)]
        homes = {home for o in unit.outs for home in self._found.homes(o)}
        if homes and self._found.stage[k] is None and self._is_smaller(unit):
            (home,) = homes
            self._found.home.update(dict.fromkeys(unit.outs, home))
            self._sent.update((o, s) for o in unit.outs for s in needed if s != home and (s, o) in self._first)
            needed = [home]
        for stage in needed:
            self._do(k, stage, self._part_needed(stage, unit))

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

    def _is_needed(self, stage: int, unit: Unit) -> bool:
        return any((stage, o) in self._first for o in unit.outs)

    def _part(self, unit: Unit) -> Part:
        if not unit.in_loop:
            return "whole"
        kinds = [self._found.kinds[i] for i in (*unit.outs, *unit.uses)]
        return "backward" if "backward" in kinds else "forward"

    def _part_needed(self, stage: int, unit: Unit) -> Part:
        """Of what is on no stage: with its first reader."""
        if not unit.in_loop:
            return "whole"
        places = [self._first[stage, o] for o in unit.outs if (stage, o) in self._first]
        return "forward" if any(p.part == "forward" or p.section != unit.section for p in places) else "backward"

    def _send_inputs(self) -> None:
        """States that are read on other stages than where they live."""
        for id_ in self._inputs:
            home = self._found.home.get(id_)
            has = self._step.living.get(id_, (home,))
            for stage in range(self._step.stages):
                if home is not None and stage not in has and (stage, id_) in self._first:
                    self._sent.add((id_, stage))
                    self._need(home, id_, _Place(0, "whole", -1))

    # -- the code

    def _code(self, stage: int, outputs: Mapping[int, int]) -> StageCode:
        placed: list[tuple[tuple[int, ...], int, Part, Instruction]] = []
        for (owner, place), units in self._done.items():
            if owner == stage:
                instruction = self._step.code[place.at]
                if units[0].lane is not None:
                    instruction = with_lanes(instruction, [u.lane for u in units if u.lane is not None])
                placed.append(((place.at, 1, 0), place.section, place.part, instruction))
        for number, message in enumerate(self._messages):
            if message.source == stage:
                send = Instruction("send", (tuple(map(Ref, message.ids)), message.target), {}, None)
                placed.append(((message.sent, 2, number), message.section, message.part, send))
            elif message.target == stage:
                shapes = tuple(map(self._step.values.local_shape, message.ids))
                what = (message.source, shapes, message.dtype)
                receive = Instruction("receive", what, {}, message.ids, (), shapes)
                placed.append(((message.received, 0, number), message.section, message.part, receive))
        placed.sort(key=lambda entry: entry[0])
        sections: list[dict[Part, list[Instruction]]] = [defaultdict(list) for _ in range(self._n)]
        for _, section, part, instruction in placed:
            sections[section][part].append(instruction)
        reads = {i for s, i in self._first if s == stage and i in self._inputs}
        reads -= {i for i, target in self._sent if target == stage}
        return StageCode(sections, reads, {id_ for id_, owner in outputs.items() if owner == stage})

    def _planned(self) -> list[_Message]:
        """All messages, in the order in which each stage receives those of another."""
        together: dict[tuple[int, int, int, Part, int, torch.dtype], list[int]] = defaultdict(list)
        for id_, target in sorted(self._sent):
            source = self._found.home[id_]
            section, part = self._way(id_, source, target)
            first = self._first[target, id_]
            here = (first.section, first.part) == (section, part)
            if first.section == section and part == "backward" and first.part == "forward":
                # Later stages wait for earlier ones in the forward: a message the other way would never come.
                raise NoCut(f"stage {target} needs something of stage {source} before it has done its part")
            key = (source, target, section, part, first.at if here else _END, self._step.values.types[id_].dtype)
            together[key].append(id_)
        found: list[_Message] = []
        sent: dict[tuple[int, int, int, Part], int] = defaultdict(lambda: -1)
        for key in sorted(together, key=lambda key: (*key[:5], str(key[5]))):
            source, target, section, part, received, dtype = key
            lane = (source, target, section, part)
            sent[lane] = max(sent[lane], *(self._made_at(i, section) for i in together[key]))
            found.append(_Message(source, target, section, part, sent[lane], received, tuple(together[key]), dtype))
        return found

    def _way(self, id_: int, source: int, target: int) -> tuple[int, Part]:
        """The section and the part in which the value is sent: a sum over passes is sent behind its loop."""
        k = self._maker.get(id_)
        if k is None:
            return 0, "whole"
        unit = self._step.units[k]
        if not unit.in_loop:
            return unit.section, "whole"
        if self._step.code[unit.at].op == "accumulate":
            return unit.section + 1, "whole"
        return unit.section, "forward" if target > source else "backward"

    def _made_at(self, id_: int, section: int) -> int:
        k = self._maker.get(id_)
        if k is None or self._step.units[k].section != section:
            return -1
        return self._step.units[k].at


@dataclass(frozen=True)
class _Message:
    """`sent` and `received`: behind which instruction, and before which."""

    source: int
    target: int
    section: int
    part: Part
    sent: int
    received: int
    ids: tuple[int, ...]
    dtype: torch.dtype


def _key(place: _Place) -> tuple[int, bool, int]:
    return place.section, place.part == "backward", place.at
