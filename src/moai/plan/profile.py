"""Profile: what operators and messages took on the devices of a machine, and times that follow from it.

In: measured by `profiling`, kept as JSON. Out: `Profiled`, which the cost model asks: measured times where there are
any, those of the cluster's description elsewhere.

Between measured sizes, logarithms are interpolated; above them time grows as the size does, below them it stays. A
larger size is never said to take less: what was disturbed while it was measured can only have become slower, so that
each point counts as the fastest of those that are at least as large. Nor is a matrix product said to take longer than
the smaller ones that it could be made of.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any, Literal, NamedTuple

import numpy as np

from moai.plan.cluster import Cluster
from moai.plan.in_place import InPlace, TimedTask
from moai.plan.timings import Described, Group
from moai.plan.work import AXES, KINDS, MESSAGES, OPERATORS, PHASES, PRECISIONS, Work

FORMAT = 2  # of the JSON
# Timed tasks of so many are kept, the newest: some hundred are a model's.
_MOST_TASKS = 20_000
# How tables are named, and over how many axes they are.
_NAMES = {
    r"matmul \w+": 3,
    r"attention (forward|backward) \w+": 2,
    r"stream \w+": 1,
    r"(all_reduce|all_gather|reduce_scatter) [1-9]\d{0,5} (waited|started)": 1,
}
# What an operator that was not measured is taken for: it moves bytes and no more.
_PLAIN = "add"
_MATMUL, _ATTENTION, _STREAM = (KINDS.index(kind) for kind in ("matmul", "attention", "stream"))
_FIRST_MESSAGE = KINDS.index(MESSAGES[0])


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a profile holds for: so many devices of a model that work at the same time, each with so many threads."""

    kind: Literal["cpu", "cuda"]
    model: str
    devices: int
    threads: int
    torch: str


@dataclass(frozen=True)
class Table:
    """Seconds on a grid: at each point of `axes` (increasing sizes above 0), row by row."""

    axes: tuple[tuple[float, ...], ...]
    seconds: tuple[float, ...]

    def at(self, *sizes: np.ndarray) -> np.ndarray:
        """Seconds at points, whose sizes are given axis by axis. Grows with each size."""
        places = [_place(axis, size) for axis, size in zip(self.axes, sizes, strict=True)]
        total = sum(place.beyond for place in places)
        for corner in itertools.product((0, 1), repeat=len(places)):
            index = tuple(p.above if c else p.below for p, c in zip(places, corner, strict=True))
            weight = math.prod((p.part if c else 1.0 - p.part) for p, c in zip(places, corner, strict=True))
            total = total + weight * self.logs[index]
        found: np.ndarray = np.exp(total)
        return found

    def points(self) -> Iterator[tuple[tuple[float, ...], float]]:
        """Each point with its seconds."""
        return zip(itertools.product(*self.axes), self.seconds, strict=True)

    def evened(self) -> Table:
        """With no size taking longer than as many smaller ones that make it up, as products do: what was disturbed can
        only have become slower."""
        shape = [len(axis) for axis in self.axes]
        grid = np.array(self.seconds).reshape(shape)
        for dim, axis in enumerate(self.axes):
            moved = np.moveaxis(grid, dim, 0)
            for at in range(1, len(axis)):
                moved[at] = np.minimum(moved[at], moved[at - 1] * (axis[at] / axis[at - 1]))
        return Table(self.axes, tuple(grid.flatten().tolist()))

    @cached_property
    def logs(self) -> np.ndarray:
        """Logarithms of the seconds that count, as a grid."""
        grid = np.log(np.array(self.seconds)).reshape([len(axis) for axis in self.axes])
        for dim in range(grid.ndim):
            grid = np.flip(np.minimum.accumulate(np.flip(grid, dim), dim), dim)
        return grid


class _Place(NamedTuple):
    """Where sizes lie on an axis: the points around each, how far it is from the one below to the one above, and the
    logarithm of how far it is beyond the last."""

    below: np.ndarray
    above: np.ndarray
    part: np.ndarray
    beyond: np.ndarray


def _place(axis: Sequence[float], sizes: np.ndarray) -> _Place:
    points, x = np.log(axis), np.log(np.maximum(sizes, 1e-300))
    last = len(points) - 1
    at = np.interp(x, points, np.arange(last + 1))
    below = np.minimum(at.astype(np.int64), max(last - 1, 0))
    return _Place(below, np.minimum(below + 1, last), at - below, np.maximum(0.0, x - points[-1]))


@dataclass(frozen=True, slots=True)
class Profile:
    """`tables` by name: "matmul fp32" over (m, n, k); "attention backward fp32" over (flops a byte, bytes); "stream
    gelu" over bytes; "all_reduce 4 waited" (or "started", for one that is done beside computing) over bytes, for a
    group of 4. `call_s`: of a call that does nothing much. `overlap_slowdown`: see `Timings`. `tasks`: of models whose
    layers were timed."""

    hardware: Hardware
    measured: str  # when, for people
    call_s: float
    overlap_slowdown: float
    tables: Mapping[str, Table]
    tasks: tuple[TimedTask, ...] = ()

    def with_tasks(self, tasks: Sequence[TimedTask]) -> Profile:
        """With `tasks`, which take the place of the same ones that were timed before."""
        new = {task.which for task in tasks}
        return replace(self, tasks=(*(task for task in self.tasks if task.which not in new), *tasks)[-_MOST_TASKS:])

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(data: Any) -> Profile:
        """Raises ValueError for what `to_json` cannot have made."""
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, and not {FORMAT}")
            tables = {name: _table(name, table) for name, table in data["tables"].items()}
            numbers = [float(data[name]) for name in ("call_s", "overlap_slowdown")]
            if not all(0.0 <= x < 1e3 for x in numbers):
                raise ValueError(f"a number is out of range: {numbers}")
            tasks = tuple(map(TimedTask.from_json, data["tasks"]))
            hardware = Hardware(**data["hardware"])
            return Profile(hardware, str(data["measured"]), numbers[0], numbers[1], tables, tasks)
        except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"something is missing or of another type: {type(error).__name__}: {error}") from error


def _table(name: str, data: Any) -> Table:
    axes = tuple(tuple(float(x) for x in axis) for axis in data["axes"])
    seconds = tuple(float(x) for x in data["seconds"])
    rising = all(axis and axis[0] > 0.0 and all(a < b < 1e300 for a, b in itertools.pairwise(axis)) for axis in axes)
    if not axes or not rising or len(seconds) != math.prod(map(len, axes)) or not all(0.0 < s < 1e6 for s in seconds):
        raise ValueError(f"the table {name!r} is no grid of times")
    if len(axes) != next((dims for pattern, dims in _NAMES.items() if re.fullmatch(pattern, name)), 0):
        raise ValueError(f"there is no table {name!r} over {len(axes)} axes")
    return Table(axes, seconds)


class Profiled:
    """Timings from a profile, and from the description of the cluster for what the profile lacks."""

    def __init__(self, profile: Profile, cluster: Cluster) -> None:
        self._tables = {n: t.evened() if n.startswith("matmul") else t for n, t in profile.tables.items()}
        self._described = Described(cluster)
        # A CPU worker computes in the thread that calls: its operators' times have the calls in them.
        self._call_s = profile.call_s
        self.host_s_per_launch = profile.call_s if profile.hardware.kind == "cuda" else 0.0
        self.overlap_slowdown = profile.overlap_slowdown
        self._stream_bytes, self._stream_logs = _stacked(self._tables)
        self._in_place = InPlace(profile.tasks, self._by_tables)
        self.has_tasks = bool(profile.tasks)
        if profile.tasks and profile.hardware.kind == "cpu":
            # A message's time in its place is what computing loses by it, whether it is waited for or not.
            self.overlap_slowdown = 1.0

    def durations(self, work: Work, groups: Mapping[str, Group]) -> np.ndarray:
        """Seconds of each task; see `Timings`."""
        return self._by_tables(work, groups) * self._in_place.factors(work, groups)[0]

    def timed_share(self, work: Work, groups: Mapping[str, Group]) -> float:
        """The part of the tasks' time that tasks take which were timed in their place, within a model's layers."""
        factors, exact = self._in_place.factors(work, groups)
        seconds = self._by_tables(work, groups) * factors
        return float(seconds[exact].sum() / max(seconds.sum(), 1e-12))

    def _by_tables(self, work: Work, groups: Mapping[str, Group]) -> np.ndarray:
        seconds = self._described.durations(work, groups)
        self._matmuls(work, seconds)
        self._attention(work, seconds)
        self._stream(work, seconds)
        self._messages(work, groups, seconds)
        return seconds

    def _matmuls(self, work: Work, seconds: np.ndarray) -> None:
        products = work.kind == _MATMUL
        for code in np.unique(work.precision[products]):
            table = self._tables.get(f"matmul {PRECISIONS[code]}")
            if table is not None:
                at = np.flatnonzero(products & (work.precision == code))
                m, n, k = work.m[at], work.n[at], work.k[at]
                one = table.at(m, n, k)
                # Several products of one call are called once.
                others = np.maximum(work.flops[at] / np.maximum(2.0 * m * n * k, 1.0) - 1.0, 0.0)
                seconds[at] = one + np.maximum(one - self._call_s, 0.0) * others

    def _attention(self, work: Work, seconds: np.ndarray) -> None:
        chosen = (work.kind == _ATTENTION) & (work.bytes > 0)
        codes = work.phase * len(PRECISIONS) + work.precision
        for code in np.unique(codes[chosen]):
            phase, precision = divmod(int(code), len(PRECISIONS))
            name = "backward" if PHASES[phase] == "backward" else "forward"
            table = self._tables.get(f"attention {name} {PRECISIONS[precision]}")
            if table is not None:
                at = np.flatnonzero(chosen & (codes == code))
                seconds[at] = table.at(work.flops[at] / work.bytes[at], work.bytes[at])

    def _stream(self, work: Work, seconds: np.ndarray) -> None:
        if not self._stream_bytes:
            return
        at = np.flatnonzero(work.kind == _STREAM)
        op, launches = work.op[at], np.maximum(work.launches[at], 1.0)
        place = _place(self._stream_bytes, work.bytes[at] / launches)
        below, above = self._stream_logs[op, place.below], self._stream_logs[op, place.above]
        seconds[at] = launches * np.exp(below + place.part * (above - below) + place.beyond)

    def _messages(self, work: Work, groups: Mapping[str, Group], seconds: np.ndarray) -> None:
        messages = work.kind >= _FIRST_MESSAGE
        codes = (work.kind * len(AXES) + work.axis) * 2 + (work.until > 1)
        for code in np.unique(codes[messages]):
            (kind, axis), started = divmod(int(code) // 2, len(AXES)), int(code) % 2
            group = groups.get(AXES[axis], Group(1))
            if group.size > 1 and group.nodes == 1:
                at = np.flatnonzero(messages & (codes == code))
                found = self._message(KINDS[kind], "started" if started else "waited", group.size, work.message[at])
                seconds[at] = seconds[at] if found is None else found

    def _message(self, kind: str, mode: str, size: int, message: np.ndarray) -> np.ndarray | None:
        """Of a group whose size was not measured: as the nearest one, by as much as the description differs."""
        sizes = [int(name.split()[1]) for name in self._tables if name.startswith(f"{kind} ")]
        if not sizes:
            return None
        nearest = min(sizes, key=lambda s: abs(math.log(s / size)))
        other = "waited" if mode == "started" else "started"
        table = self._tables.get(f"{kind} {nearest} {mode}") or self._tables[f"{kind} {nearest} {other}"]
        found = table.at(message)
        if nearest == size:
            return found
        here, there = (self._described.message_s(kind, message, Group(s, 1, s)) for s in (size, nearest))
        return found * here / np.maximum(there, 1e-12)


def _stacked(tables: Mapping[str, Table]) -> tuple[tuple[float, ...], np.ndarray]:
    """Bytes, and for each of OPERATORS the logarithms of its seconds there; nothing where none was measured."""
    plain = tables.get(f"stream {_PLAIN}")
    if plain is None:
        return (), np.empty(0)
    (axis,) = plain.axes
    rows = [tables.get(f"stream {op}", plain).at(np.array(axis)) for op in OPERATORS]
    return axis, np.log(np.stack(rows))
