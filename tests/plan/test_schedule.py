"""In which order the devices of a pipeline work: nobody waits forever, bubbles and memory are those of the papers."""

from __future__ import annotations

from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.lower.stages.exchange_check import Event, misfit
from moai.plan.plan import Schedule
from moai.plan.schedule import Order, order

SCHEDULES: tuple[Schedule, ...] = ("gpipe", "1f1b", "zero_bubble", "interleaved")


class Pipeline:
    """`devices` that run `passes` of a model with `chunks` stages each. A forward takes a second, a backward two."""

    def __init__(self, schedule: Schedule, devices: int, passes: int, chunks: int = 1) -> None:
        self.devices, self.passes, self.chunks = devices, passes, chunks
        self.orders: list[Order] = [order(schedule, d, devices, passes, chunks) for d in range(devices)]
        self.weights_apart = schedule == "zero_bubble"

    def before(self, device: int, part: int) -> tuple[int, int] | None:
        """The device and the part that sends what a part needs."""
        turn = self.turn(device, part)
        return None if turn % (2 * self.devices * self.chunks) == 0 else self._at(turn - 1)

    def turn(self, device: int, part: int) -> int:
        n = self.devices
        return part * n + device if part < self.chunks else (part + 1) * n - 1 - device

    def _at(self, turn: int) -> tuple[int, int]:
        part, place = divmod(turn, self.devices)
        return (place, part) if part < self.chunks else (self.devices - 1 - place, part)

    def events(self) -> list[list[Event]]:
        """The messages, each naming its part and its pass."""
        receivers = {self.before(d, part): d for d in range(self.devices) for part in range(2 * self.chunks)}
        found: list[list[Event]] = [[] for _ in range(self.devices)]
        numbers: dict[tuple[int, int, int], int] = {}
        count: dict[tuple[int, int], int] = defaultdict(int)
        for device, own in enumerate(self.orders):
            for part, step in own:
                target = receivers.get((device, part), device)
                if target != device:
                    numbers[device, part, step] = count[device, target]
                    count[device, target] += 1
        for device, own in enumerate(self.orders):
            for part, step in own:
                source = self.before(device, part) if part < 2 * self.chunks else None
                if source is not None and source[0] != device:
                    found[device].append(Event(source[0], (*source, step), numbers[source[0], source[1], step]))
                target = receivers.get((device, part), device)
                if target != device:
                    found[device].append(Event(target, (device, part, step)))
        return found

    def seconds(self) -> float:
        """Until the last device is done."""
        done: dict[tuple[int, int, int], float] = {}
        now, at = [0.0] * self.devices, [0] * self.devices
        for _ in range(len(self.orders[0]) * self.devices):  # enough, if nobody waits forever
            for device, own in enumerate(self.orders):
                while at[device] < len(own):
                    part, step = own[at[device]]
                    source = (device, 1) if part == 2 * self.chunks else self.before(device, part)
                    if source is not None and (*source, step) not in done:
                        break
                    now[device] = max(now[device], done[source[0], source[1], step] if source else 0.0) + self._takes(
                        part
                    )
                    done[device, part, step] = now[device]
                    at[device] += 1
        return max(now)

    def _takes(self, part: int) -> float:
        return 2.0 / self.chunks if self.chunks <= part and not self.weights_apart else 1.0 / self.chunks

    def bubble(self) -> float:
        """The seconds that a device waits."""
        return self.seconds() - 3 * self.passes

    def held(self, device: int) -> int:
        """Forwards whose last part has not been done, at most."""
        now, most = 0, 0
        for part, _ in self.orders[device]:
            now += part < self.chunks
            now -= part == 2 if self.weights_apart else part >= self.chunks
            most = max(most, now)
        return most


pipelines = st.builds(
    lambda schedule, devices, passes, chunks: Pipeline(
        schedule, devices, passes, chunks if schedule == "interleaved" else 1
    ),
    st.sampled_from(SCHEDULES),
    st.integers(1, 9),
    st.integers(1, 20),
    st.integers(2, 4),
)


@given(pipelines)
def test_every_part_is_run_once_and_in_the_order_of_the_passes(pipeline: Pipeline) -> None:
    parts = 3 if pipeline.weights_apart else 2 * pipeline.chunks
    for own in pipeline.orders:
        for wanted in range(parts):
            assert [step for part, step in own if part == wanted] == list(range(pipeline.passes))
        assert len(own) == parts * pipeline.passes


@given(pipelines)
def test_a_pass_goes_through_its_parts_in_their_order(pipeline: Pipeline) -> None:
    for own in pipeline.orders:
        for wanted in range(pipeline.passes):
            found = [part for part, step in own if step == wanted]
            assert found == sorted(found)


@given(pipelines)
def test_no_device_waits_forever(pipeline: Pipeline) -> None:
    assert misfit(pipeline.events()) is None


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_no_device_of_64_waits_forever(schedule: Schedule) -> None:
    assert misfit(Pipeline(schedule, 64, 100, 2 if schedule == "interleaved" else 1).events()) is None


def test_bubbles_are_those_of_the_papers() -> None:
    for n, passes in ((2, 8), (4, 16)):
        assert Pipeline("gpipe", n, passes).bubble() == Pipeline("1f1b", n, passes).bubble() == 3 * (n - 1)
        assert Pipeline("interleaved", n, passes, 2).bubble() == 3 * (n - 1) / 2
        assert Pipeline("zero_bubble", n, passes).bubble() == n - 1


def test_schedules_hold_as_many_micro_batches_as_the_papers_say() -> None:
    held = {s: [Pipeline(s, 4, 16).held(device) for device in range(4)] for s in ("gpipe", "1f1b", "zero_bubble")}
    assert held == {"gpipe": [16] * 4, "1f1b": [4, 3, 2, 1], "zero_bubble": [4] * 4}
    assert [Pipeline("interleaved", 4, 16, 2).held(device) for device in range(4)] == [11, 9, 7, 5]  # halves
