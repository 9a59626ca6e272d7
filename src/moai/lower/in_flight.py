"""What a device of a pipeline holds for other micro-batches than the one it works at.

In: a program whose loop has several parts; how large messages and handed-on values are. Out: when in the loop a part is
run with most beside it, and how many bytes that is.

Beside it are values that one part has made and a later one will take, and messages that are received ahead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from moai.lower.program import Instruction, PerRank, Program
from moai.lower.program_order import passes, runs
from moai.lower.stages.arrivals import ahead

Way = tuple[int, int]  # the part that a list is filled in, and the one that it is emptied in


@dataclass(frozen=True)
class Moment:
    """A part of pass `step` is about to be run. `held`: the passes whose entries are in the lists of each way. `begun`:
    the parts that have been run for a pass or more."""

    step: int
    held: Mapping[Way, range]
    begun: frozenset[int]


@dataclass(frozen=True)
class Loop:
    """`parts`: positions of their instructions. `order`: (part, pass) as they are run. `ways`: of the lists that go
    from part to part."""

    parts: Sequence[range]
    order: Sequence[tuple[int, int]]
    ways: Mapping[int, Way]

    @staticmethod
    def of(program: Program, begin: int) -> Loop:
        """The loop that begins at instruction `begin`."""
        code = program.instructions
        end = next(at for at in range(begin, len(code)) if code[at].op == "end_repeat")
        begins = [at for at in range(begin, end) if code[at].op == "begin_part"] or [begin]
        parts = [range(a + 1, b) for a, b in pairwise([*begins, end])]
        filled = {code[at].outs: part for part, own in enumerate(parts) for at in own if code[at].op == "collect"}
        emptied = {code[at].args[0].id: part for part, own in enumerate(parts) for at in own if code[at].op == "take"}
        ways = {list_: (part, emptied[list_]) for list_, part in filled.items() if list_ in emptied}
        return Loop(parts, passes(program, begin), ways)

    def fullest(
        self,
        part: int,
        later: bool,
        sizes: Mapping[frozenset[Way], int],
        totals: Mapping[int, int],
        waiting: Callable[[int, int], int],
    ) -> Moment:
        """When most is held as `part` begins in the first pass, or in a later one. `sizes`: of an entry that lists of
        these ways hold together. `totals`: the bytes that each part adds up. `waiting`: those of messages, by the place
        of an instruction and the pass."""
        done = dict.fromkeys(range(len(self.parts)), 0)
        most, found = -1, Moment(0, dict.fromkeys(self.ways.values(), range(0)), frozenset())
        for each, step in self.order:
            if each == part and later == (step > 0):
                held = {way: range(done[way[1]], done[way[0]]) for way in set(self.ways.values())}
                begun = frozenset(part for part, passes in done.items() if passes)
                nbytes = sum(size * len(together(held, ways)) for ways, size in sizes.items())
                nbytes += sum(totals.get(part, 0) for part in begun) + waiting(self.parts[part].start, step)
                if nbytes > most:
                    most, found = nbytes, Moment(step, held, begun)
            done[each] += 1
        return found


def together(held: Mapping[Way, range], ways: Collection[Way]) -> set[int]:
    """The passes that have an entry in some of the lists."""
    return {step for way in ways for step in held[way]}


class Waiting:
    """The bytes of messages that have been received, or may have been, before they are needed (`runtime.inbox`)."""

    def __init__(self, program: Program, nbytes: Callable[[Instruction], int]) -> None:
        """`nbytes`: of the message that a receive takes."""
        self._at: dict[tuple[int, int], int] = {}
        code = program.instructions
        sizes: dict[int, dict[int, int]] = defaultdict(dict)
        for part, step in runs(program):
            for index in part:
                if code[index].op == "receive":
                    sizes[code[index].args[0]][_number(code[index], step)] = nbytes(code[index])
        early = {stage: ahead(program, stage) for stage in sizes}
        expected = dict.fromkeys(sizes, 0)
        now = 0

        def expect(stage: int, until: int) -> int:
            until = min(until, len(sizes[stage]))
            more = sum(sizes[stage][nth] for nth in range(expected[stage], until))
            expected[stage] = max(expected[stage], until)
            return more

        for stage in sizes:
            now += expect(stage, early[stage])
        for part, step in runs(program):
            self._at[part.start, step or 0] = now
            for index in part:
                if code[index].op == "receive":
                    stage, nth = code[index].args[0], _number(code[index], step)
                    now += expect(stage, nth + 1 + early[stage]) - sizes[stage][nth]
                    self._at[index, step or 0] = now

    def at(self, index: int, step: int) -> int:
        """When a part, or what is around loops, begins at `index`; behind the receive there."""
        return self._at.get((index, step), 0)


def _number(receive: Instruction, step: int | None) -> int:
    nth = receive.args[1]
    return nth.values[step or 0] if isinstance(nth, PerRank) else nth
