"""Measuring a Profile: which sizes are timed, and the tables they make.

In: an Accelerator. Out: a Profile. What is timed runs on all devices at once, since they share the machine.
"""

from __future__ import annotations

import datetime
import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from moai.plan.profile import Hardware, Profile, Table
from moai.plan.work import OPERATORS
from moai.profiling import cases
from moai.profiling.stopwatch import Case, Stopwatch
from moai.runtime.accelerator import Accelerator

MESSAGES = ("all_reduce", "all_gather", "reduce_scatter")
MODES = ("waited", "started")
KIB, MIB = 1 << 10, 1 << 20
# Everything is timed so many times, minutes apart: what disturbs one time does not disturb the other.
ROUNDS = 2
# No tensor of a case is larger than this share of a device's memory.
_MEMORY_SHARE = 32
_OVERLAP_BYTES, _OVERLAP_LENGTH = 4 * MIB, 256
_OVERLAP_TIMES = 7  # it is a difference of two times
# An operator goes through so many bytes in turn, but through no more sets of tensors than so many.
_TURN_BYTES, _MOST_TURNS = 16 * MIB, 64


@dataclass(frozen=True, slots=True)
class Sizes:
    """`lengths` of matrix products (m, n and k); `sequences`, and `rows` in all, of attention; bytes of `operators` and
    of `messages`; the `names` of operators."""

    precisions: tuple[str, ...]
    lengths: tuple[int, ...]
    sequences: tuple[int, ...]
    rows: tuple[int, ...]
    operators: tuple[float, ...]
    messages: tuple[float, ...]
    names: tuple[str, ...] = OPERATORS[1:]

    def fitting(self, memory_bytes: int) -> Sizes:
        """Without what is too large for a device of so much memory."""
        most = memory_bytes / _MEMORY_SHARE
        return replace(
            self,
            operators=tuple(n for n in self.operators if n <= most) or self.operators[:1],
            messages=tuple(n for n in self.messages if n <= most) or self.messages[:1],
        )


STANDARD = {
    "cpu": Sizes(
        ("fp32", "bf16"),
        lengths=(8, 32, 128, 512, 2048),
        sequences=(64, 256, 1024),
        rows=(1024, 8192),
        operators=(16 * KIB, 256 * KIB, 4 * MIB, 32 * MIB),
        messages=(4 * KIB, 64 * KIB, 1 * MIB, 4 * MIB, 32 * MIB),
    ),
    "cuda": Sizes(
        ("fp32", "bf16"),
        lengths=(128, 512, 2048, 8192),
        sequences=(256, 1024, 4096),
        rows=(16 * KIB, 256 * KIB),
        operators=(64 * KIB, 1 * MIB, 16 * MIB, 256 * MIB),
        messages=(64 * KIB, 1 * MIB, 16 * MIB, 256 * MIB),
    ),
}


@dataclass(frozen=True, slots=True)
class _Job:
    """A table: its name, its axes, and what is timed at each point."""

    name: str
    axes: tuple[tuple[float, ...], ...]
    cases: Sequence[Callable[[], Case]]


class Measurement:
    """`steps`: how many cases there are to time; `run` times them."""

    def __init__(
        self, accelerator: Accelerator, hardware: Hardware, sizes: Sizes, watch: Stopwatch | None = None
    ) -> None:
        self._accelerator = accelerator
        self._hardware = hardware
        self._watch = watch or Stopwatch(accelerator)
        n = accelerator.n_devices
        fitting = sizes.fitting(min(d.memory_bytes for d in accelerator.devices))
        self._jobs = [*_matmuls(fitting), *_attentions(fitting), *_operators(fitting), *_messages(fitting, n)]
        self.steps = ROUNDS * sum(len(job.cases) for job in self._jobs)

    def run(self, advance: Callable[[], None] = lambda: None) -> Profile:
        """Calls `advance` after every step. RuntimeError if a worker fails."""
        call_s = self._watch.of_case(cases.nothing_much())
        rounds = [self._round(advance) for _ in range(ROUNDS)]
        tables = {
            job.name: Table(job.axes, tuple(map(min, zip(*times, strict=True))))
            for job, *times in zip(self._jobs, *rounds, strict=True)
        }
        slowdown = self._overlap_slowdown()
        measured = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        return Profile(self._hardware, measured, call_s, slowdown, tables)

    def _round(self, advance: Callable[[], None]) -> list[list[float]]:
        """Seconds of each job's cases."""
        found: list[list[float]] = [[] for _ in self._jobs]
        for job, seconds in zip(self._jobs, found, strict=True):
            for case in job.cases:
                seconds.append(self._watch.of_case(case()))
                advance()
        return found

    def _overlap_slowdown(self) -> float:
        """The share of a message's time that computing beside it becomes longer by."""
        n = self._accelerator.n_devices
        if n == 1:
            return 0.0
        sent = cases.message("all_reduce", "started", _OVERLAP_BYTES, n, n)
        message = min(self._watch.of_case(sent) for _ in range(_OVERLAP_TIMES))
        product = self._watch.of_case(cases.beside(0, 1, _OVERLAP_LENGTH, n))
        products = min(500, max(1, round(2.0 * message / product)))  # longer than the message
        alone, both = (cases.beside(nbytes, products, _OVERLAP_LENGTH, n) for nbytes in (0, _OVERLAP_BYTES))
        lost = [self._watch.of_case(both) - self._watch.of_case(alone) for _ in range(_OVERLAP_TIMES)]
        return min(1.0, max(0.0, statistics.median(lost) / message))


def _matmuls(sizes: Sizes) -> Iterator[_Job]:
    lengths = tuple(map(float, sizes.lengths))
    for precision in sizes.precisions:
        timed = [partial(cases.matmul, m, n, k, precision) for m, n, k in itertools.product(sizes.lengths, repeat=3)]
        yield _Job(f"matmul {precision}", (lengths,) * 3, timed)


def _attentions(sizes: Sizes) -> Iterator[_Job]:
    """Over intensity and bytes, of which the first goes with the sequence and the second with the rows."""
    rows = [r for r in sizes.rows if r >= max(sizes.sequences)] or [max(sizes.sequences)]
    for precision, backward in itertools.product(sizes.precisions, (False, True)):
        grid = [[(s, r, precision, backward) for r in rows] for s in sizes.sequences]
        counted = [[cases.attention_size(*point) for point in line] for line in grid]
        intensities = tuple(flops / nbytes for (flops, nbytes), *_ in counted)
        timed = [partial(cases.attention, *point) for line in grid for point in line]
        name = f"attention {'backward' if backward else 'forward'} {precision}"
        yield _Job(name, (intensities, tuple(nbytes for _, nbytes in counted[0])), timed)


def _operators(sizes: Sizes) -> Iterator[_Job]:
    for name in sizes.names:
        timed = [partial(_in_turn, name, n) for n in sizes.operators]
        yield _Job(f"stream {name}", (sizes.operators,), timed)


def _in_turn(name: str, nbytes: float) -> Case:
    turns = max(1, min(_MOST_TURNS, int(_TURN_BYTES / nbytes)))
    return cases.in_turn(cases.operator(name, nbytes), turns)


def _messages(sizes: Sizes, n_devices: int) -> Iterator[_Job]:
    groups = [size for size in range(2, n_devices + 1) if n_devices % size == 0]
    for size, kind, mode in itertools.product(groups, MESSAGES, MODES):
        timed = [partial(cases.message, kind, mode, n, size, n_devices) for n in sizes.messages]
        yield _Job(f"{kind} {size} {mode}", (sizes.messages,), timed)
