"""What a device sends to other stages and receives of them, as its program says.

In: a program, and what its messages were found to hold in some of the passes. Out: `Event`s in the order of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moai.lower.operators import MESSAGES
from moai.lower.program import PerRank, Program
from moai.lower.program_order import runs
from moai.lower.stages.exchange_check import Event

What = tuple[Any, ...]


class Mail:
    """Collects what messages hold."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._found: dict[tuple[int, int | None], What] = {}  # by instruction and pass

    def note(self, index: int, step: int | None, what: What) -> None:
        """The message that instruction `index` sends or receives in pass `step` (None: outside of loops)."""
        self._found[index, step] = what

    def events(self, same_as: Sequence[int]) -> list[Event]:
        """All that is sent and received. `same_as`: for each pass one that was noted and has messages like its own."""
        found = []
        for part, step in runs(self._program):
            for index in part:
                instruction = self._program.instructions[index]
                if instruction.op in MESSAGES:
                    what = self._found[index, None if step is None else same_as[step]]
                    found.append(self._event(instruction.op, instruction.args, what, step or 0))
        return found

    def _event(self, op: str, args: tuple[Any, ...], what: What, step: int) -> Event:
        if op == "send":
            return Event(args[1], what)
        stage, nth = args[:2]
        return Event(stage, what, nth.values[step] if isinstance(nth, PerRank) else nth)
