"""Messages between stages: received ahead of their use, in the order in which they are sent; a dead sender is named."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch

from moai.graph.placement import REPLICATE, Mesh, Placement
from moai.graph.step_graph import Ref
from moai.lower.program import PerRank, Program
from moai.runtime.accelerator import Accelerator
from moai.runtime.inbox import Inbox
from moai.runtime.partners import Arriving
from tests.runtime.programs import f32, op, program, slot

BOTH = Mesh((("pp", 2),))
TURNS = Mesh((("pp", 2), ("micro", 3)))


class Sender:
    """A partner whose messages hold their number, and are there at once."""

    def __init__(self) -> None:
        self.expected = 0

    def send(self, xs: Sequence[torch.Tensor]) -> None:
        raise NotImplementedError

    def expect(self, length: int, dtype: torch.dtype) -> Arriving:
        self.expected += 1
        return Arriving(None, torch.full((length,), self.expected - 1, dtype=dtype))


def received(inbox: Inbox, nth: int) -> float:
    (x,) = inbox.receive(nth, ((2, 2),), torch.float32)
    assert x.shape == (2, 2)
    return x[0, 0].item()


def test_a_few_messages_are_expected_before_they_are_needed_and_no_more() -> None:
    sender = Sender()
    inbox = Inbox(sender, [(4, torch.float32)] * 6, ahead=2)
    inbox.open()
    assert sender.expected == 2
    assert received(inbox, 0) == 0 and sender.expected == 3
    assert [received(inbox, nth) for nth in range(1, 6)] == [1, 2, 3, 4, 5]
    assert sender.expected == 6


def test_what_is_needed_late_waits_for_its_turn() -> None:
    inbox = Inbox(Sender(), [(4, torch.float32)] * 4, ahead=1)
    inbox.open()
    assert [received(inbox, nth) for nth in (2, 0, 3, 1)] == [2, 0, 3, 1]
    inbox.open()  # the next run


def stages(first: Program, second: Program) -> Program:
    """One program for both devices."""
    whole = replace(first, instructions=(), stages=(first, second))
    return replace(whole, inputs=(*first.inputs, *second.inputs), outputs=(*first.outputs, *second.outputs))


def on(stage: int) -> Placement:
    return replace(REPLICATE, stages=(stage,))


def two(mesh: Mesh, sender: list[object], receiver: list[object], outs: Sequence[int]) -> Program:
    """Value 0 is on the first stage; the results `outs`, of [2], on the second one."""
    first = program(mesh, [slot(0, f32(2), on(0))], [], *sender)
    second = program(mesh, [], [slot(o, f32(2), on(1)) for o in outs], *receiver)
    return stages(first, second)


def test_messages_come_in_another_order_than_they_are_needed_in(accelerator: Callable[[int], Accelerator]) -> None:
    a = accelerator(2)
    sends = [op("aten.add.Scalar", Ref(0), 1, outs=1), op("send", (Ref(0),), 1), op("send", (Ref(1),), 1)]
    receives = [op("receive", 0, nth, ((2,),), torch.float32, outs=(10 + nth,)) for nth in (1, 0)]
    found = a.run(two(BOTH, sends, receives, (10, 11)), [a.upload(torch.zeros(2), on(0), BOTH)], [])
    assert [a.read(x).tolist() for x in found] == [[0, 0], [1, 1]]


def test_each_pass_takes_its_own_message(accelerator: Callable[[int], Accelerator]) -> None:
    a = accelerator(2)
    sends = [
        op("repeat"),
        op("aten.add.Scalar", Ref(0), PerRank(("micro",), (1, 10, 100)), outs=1),
        op("send", (Ref(1),), 1),
        op("end_repeat"),
    ]
    numbers = PerRank(("micro",), (0, 1, 2))
    receives = [
        op("repeat"),
        op("receive", 0, numbers, ((2,),), torch.float32, outs=(10,)),
        op("aten.mul.Scalar", Ref(10), PerRank(("micro",), (1, 2, 3)), outs=11),
        op("accumulate", Ref(11), True, outs=12),
        op("end_repeat"),
    ]
    for _ in range(2):  # the first run is another one than the later ones
        (found,) = a.run(two(TURNS, sends, receives, (12,)), [a.upload(torch.zeros(2), on(0), TURNS)], [])
        assert a.read(found).tolist() == [321, 321]


def test_a_stage_that_dies_is_named_though_another_waits_for_its_message(doomed: Accelerator) -> None:
    busy = [op("aten.zeros.default", (4000, 4000), outs=1), *(op("aten.mm.default", Ref(1), Ref(1), outs=1),) * 9]
    waits = [op("receive", 0, 0, ((2,),), torch.float32, outs=(10,), where="train.py:7")]
    p = two(BOTH, [*busy, op("send", (Ref(0),), 1)], waits, (10,))
    doomed.run(p, [doomed.upload(torch.zeros(2), on(0), BOTH)], [])
    time.sleep(0.5)
    os.kill(doomed._links[0].worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match=r"device 0 .*lost in step 1: .*SIGKILL"):
        doomed.synchronize()
