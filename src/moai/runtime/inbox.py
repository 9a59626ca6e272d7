"""What a stage receives, received ahead of its use.

In: a Program, whose receives say which of its sender's messages they take. Out: for each sender an `Inbox`.

A sender's messages are expected in the order in which it sends them, which a program fixes; a few more of them than are
needed yet (`ahead`), so that they arrive while the device computes. What is sent early and needed late waits here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from moai.lower.program import Program
from moai.lower.stages.arrivals import ahead
from moai.runtime import loops
from moai.runtime.partners import Arriving, Partner

Tensors = tuple[torch.Tensor, ...]
Size = tuple[int, torch.dtype]  # entries of a message


class Inbox:
    """The messages of one device in a run of a program. `sizes`: in the order in which they are sent."""

    def __init__(self, partner: Partner, sizes: Sequence[Size], ahead: int) -> None:
        self._partner = partner
        self._sizes = sizes
        self._ahead = ahead
        self._arriving: dict[int, Arriving] = {}
        self._expected = 0

    def open(self) -> None:
        """A run begins."""
        assert not self._arriving, "messages of the last run were left"
        self._expected = 0
        self._expect(self._ahead)

    def receive(self, nth: int, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensors:
        """The tensors in message `nth`; waits for it. Each is taken once."""
        self._expect(nth + 1)
        message = self._arriving.pop(nth).wait()
        self._expect(nth + 1 + self._ahead)
        assert message.dtype == dtype
        sizes = [torch.Size(shape).numel() for shape in shapes]
        return tuple(part.view(tuple(shape)) for part, shape in zip(message.split(sizes), shapes, strict=True))

    def _expect(self, until: int) -> None:
        for nth in range(self._expected, min(until, len(self._sizes))):
            self._arriving[nth] = self._partner.expect(*self._sizes[nth])
            self._expected = nth + 1


def inboxes(
    program: Program, in_pass: Callable[[Any, int], Any], partners: Mapping[int, Partner]
) -> Mapping[int, Inbox]:
    """By the stage that sends, as `partners` are. `in_pass`: an argument as it is in a pass."""
    sizes: dict[int, dict[int, Size]] = defaultdict(dict)
    for index, step in loops.order(program):
        instruction = program.instructions[index]
        if instruction.op == "receive":
            stage, nth, shapes, dtype = instruction.args
            length = sum(torch.Size([in_pass(n, step) for n in shape]).numel() for shape in shapes)
            sizes[stage][in_pass(nth, step)] = length, dtype
    return {
        stage: Inbox(partners[stage], [found[nth] for nth in range(len(found))], ahead(program, stage))
        for stage, found in sizes.items()
    }
