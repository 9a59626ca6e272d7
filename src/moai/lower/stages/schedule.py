"""In which order a device runs the parts of its passes: forwards, backwards and more of micro-batches.

In: a schedule, a device's number, how many there are, passes, chunks. Out: (part, pass), part after part.

Every device goes through each of its parts in the order of the passes, and a pass goes through its parts in their
order. What the parts are is said in `messages`, and for "zero_bubble" in `weights`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moai.plan.plan import Schedule

Order = tuple[tuple[int, int], ...]  # (part, pass)

# The parts of a device with one stage. What others have is said in `messages` and `weights`.
FORWARD, BACKWARD = 0, 1


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
    """ZB-H1 (Qi et al., "Zero Bubble Pipeline Parallelism", ICLR 2024): as 1F1B, but gradients of weights (part 2) come
    as many passes later as a device's number says. Each of them begins with the fewer forwards the later it is, so that
    all hold as much as the first one does with 1F1B."""
    late = iter([(2, step) for step in range(passes)])
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
