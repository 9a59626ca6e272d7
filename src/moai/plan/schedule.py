"""In which order a device runs the parts of its passes: forwards, backwards and more of micro-batches; and when.

In: a schedule, a device's number, how many there are, passes, chunks. Out: (part, pass), part after part; and, with the
seconds that each part takes, when it is run.

Every device goes through each of its parts in the order of the passes, and a pass goes through its parts in their
order: the forwards of the stages that the device has, their backwards the other way round, and with "zero_bubble" the
gradients of weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

from moai.plan.plan import Schedule

Order = tuple[tuple[int, int], ...]  # (part, pass)

# The parts of a device with one stage.
FORWARD, BACKWARD, WEIGHTS = 0, 1, 2
# With more passes than so many a device, each further round of passes takes as long as the one before.
_ROUNDS = 4


@lru_cache(maxsize=512)
def order(schedule: Schedule, device: int, devices: int, passes: int, chunks: int = 1) -> Order:
    """`chunks`: the stages of each device, for "interleaved"."""
    if schedule == "interleaved":
        return tuple(_interleaved(device, devices, passes, chunks))
    if schedule == "zero_bubble":
        return tuple(_zero_bubble(device, devices, passes))
    first = passes if schedule == "gpipe" else devices - device
    forwards, backwards = ([(part, step) for step in range(passes)] for part in (FORWARD, BACKWARD))
    return tuple(_in_turns(forwards, backwards, first))


def _in_turns(
    forwards: list[tuple[int, int]], backwards: list[tuple[int, int]], first: int
) -> Iterator[tuple[int, int]]:
    """`first` forwards, then a backward and a forward in turns. With "1f1b" a device begins with as many forwards as
    there are stages from it to the last one, whose micro-batches it then holds at most."""
    yield from forwards[:first]
    rest = iter(forwards[first:])
    for backward in backwards:
        yield backward
        yield from _next(rest)


def _zero_bubble(device: int, devices: int, passes: int) -> Iterator[tuple[int, int]]:
    """ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024): as 1F1B, but gradients of weights come
    as many passes later as a device's number says. Each of them begins with the fewer forwards the later it is, so that
    all hold as much as the first one does with 1F1B."""
    late = iter([(WEIGHTS, step) for step in range(passes)])
    forwards, backwards = ([(part, step) for step in range(passes)] for part in (FORWARD, BACKWARD))
    for part, step in _in_turns(forwards, backwards, devices - device):
        yield part, step
        if part == BACKWARD and step >= device:
            yield from _next(late)
    yield from late


def _interleaved(device: int, devices: int, passes: int, chunks: int) -> Iterator[tuple[int, int]]:
    """Interleaved 1F1B (Narayanan et al., "Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM", SC21): as many micro-batches as there are devices go through all chunks, then the next ones. Where
    there are too few for the last round, the others are left out of the order: what waits for what is the same then."""
    rounds = [range(begin, begin + devices) for begin in range(0, passes, devices)]
    forwards = [(chunk, step) for steps in rounds for chunk in range(chunks) for step in steps]
    backwards = [(chunks + chunk, step) for steps in rounds for chunk in range(chunks) for step in steps]
    first = (chunks - 1) * devices + 2 * (devices - 1 - device) + 1
    return ((part, step) for part, step in _in_turns(forwards, backwards, first) if step < passes)


def _next(steps: Iterator[tuple[int, int]]) -> Iterable[tuple[int, int]]:
    return [step for step in [next(steps, None)] if step is not None]


class Turn(NamedTuple):
    """A part of a pass, and from when to when (seconds) it is run."""

    part: int
    step: int
    begin: float
    end: float


def stage_of(part: int, device: int, devices: int, chunks: int = 1) -> int:
    """The stage that a part of `device` is of."""
    return (part if part < chunks else max(0, 2 * chunks - 1 - part)) * devices + device


def played(
    schedule: Schedule, passes: int, seconds: Sequence[Sequence[float]], hop_s: float = 0.0, chunks: int = 1
) -> list[list[Turn]]:
    """The turns of each device, where `seconds[device][part]` is what a part takes. Each begins when the one before it
    has ended, and when what it needs has arrived: `hop_s` after it was made on another device."""
    devices, last = len(seconds), len(seconds) * chunks - 1
    orders = [order(schedule, device, devices, passes, chunks) for device in range(devices)]
    found: list[list[Turn]] = [[] for _ in range(devices)]
    done: list[dict[tuple[int, int], float]] = [{}, {}]  # by (stage, pass): of forwards, and of backwards
    left = sum(map(len, orders))
    while left:
        before = left
        for device, own in enumerate(found):
            now = own[-1].end if own else 0.0
            while len(own) < len(orders[device]):
                part, step = orders[device][len(own)]
                stage, way = stage_of(part, device, devices, chunks), int(part >= chunks)
                ready: float | None = 0.0
                if way and stage == last:
                    ready = done[0].get((stage, step))
                elif part < 2 * chunks and (way or stage):
                    ready = done[way].get((stage + 1 if way else stage - 1, step))
                    ready = None if ready is None else ready + hop_s
                if ready is None:
                    break
                now, begin = max(now, ready) + seconds[device][part], max(now, ready)
                own.append(Turn(part, step, begin, now))
                if part < 2 * chunks:
                    done[way][stage, step] = now
                left -= 1
        assert left < before, "an order in which devices wait for each other"
    return found


def finish(
    schedule: Schedule, passes: int, seconds: Sequence[Sequence[float]], hop_s: float = 0.0, chunks: int = 1
) -> float:
    """When the last device has run its last part. Many passes are not all played: in the middle, rounds of as many
    passes as there are devices take equally long."""
    devices = len(seconds)
    fewer = _ROUNDS * devices + passes % devices
    if passes <= fewer + devices:
        return max(own[-1].end for own in played(schedule, passes, seconds, hop_s, chunks))
    less, more = (finish(schedule, n, seconds, hop_s, chunks) for n in (fewer, fewer + devices))
    return more + (passes - fewer - devices) // devices * (more - less)


@lru_cache(maxsize=1024)
def under_way(schedule: Schedule, device: int, devices: int, passes: int, chunks: int = 1) -> int:
    """How many forwards of its stages a device has done without their backwards, at the most."""
    most = now = 0
    for part, _ in order(schedule, device, devices, passes, chunks):
        now += 1 if part < chunks else -1 if part < 2 * chunks else 0
        most = max(most, now)
    return most


def put_off(schedule: Schedule, device: int, passes: int) -> int:
    """Of how many passes a device has yet to compute gradients of weights when it is at work at another one."""
    return min(device, passes) if schedule == "zero_bubble" else 0
