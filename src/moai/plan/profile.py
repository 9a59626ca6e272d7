"""Profile: what operators and messages took on the devices of a machine, and times that follow from it.

In: measured by `profiling`, kept as JSON. Out: `Profiled`, which the cost model asks: measured times where there are
any, those of the cluster's description elsewhere.

Between measured sizes, logarithms are interpolated; above them time grows as the size does, below them it stays. A
larger size is never said to take less: what was disturbed while it was measured can only have become slower, so that
each point counts as the fastest of those that are at least as large.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

from moai.plan.cluster import Cluster
from moai.plan.timings import Described, Group
from moai.plan.work import AXES, KINDS, MESSAGES, OPERATORS, PHASES, PRECISIONS, Work

FORMAT = 1  # of the JSON
# What an operator that was not measured is taken for: it moves bytes and no more.
_PLAIN = "add"
_MATMUL, _ATTENTION, _STREAM = (KINDS.index(kind) for kind in ("matmul", "attention", "stream"))


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
        logs = self._logs
        low, part = [], []
        beyond = np.zeros(np.shape(sizes[0]))
        for axis, size in zip(self.axes, sizes, strict=True):
            points, x = np.log(axis), np.log(np.maximum(size, 1e-300))
            place = np.interp(x, points, np.arange(len(axis)))
            beyond = beyond + np.maximum(0.0, x - points[-1])
            below = np.minimum(place.astype(np.int64), max(len(axis) - 2, 0))
            low.append(below)
            part.append(place - below)
        total = beyond
        for corner in itertools.product((0, 1), repeat=len(self.axes)):
            index = tuple(np.minimum(i + c, n - 1) for i, c, n in zip(low, corner, logs.shape, strict=True))
            weight = math.prod((p if c else 1.0 - p) for p, c in zip(part, corner, strict=True))
            total = total + weight * logs[index]
        found: np.ndarray = np.exp(total)
        return found

    def points(self) -> Iterator[tuple[tuple[float, ...], float]]:
        """Each point with its seconds."""
        return zip(itertools.product(*self.axes), self.seconds, strict=True)

    @cached_property
    def _logs(self) -> np.ndarray:
        grid = np.log(np.array(self.seconds)).reshape([len(axis) for axis in self.axes])
        for dim in range(grid.ndim):
            grid = np.flip(np.minimum.accumulate(np.flip(grid, dim), dim), dim)
        return grid


@dataclass(frozen=True, slots=True)
class Profile:
    """`tables` by name: "matmul fp32" over (m, n, k); "attention backward fp32" over (flops a byte, bytes); "stream
    gelu" over bytes; "all_reduce 4 waited" (or "started", for one that is done beside computing) over bytes, for a
    group of 4. `call_s`: of a call that does nothing much. `overlap_slowdown`: see `Timings`."""

    hardware: Hardware
    measured: str  # when, for people
    call_s: float
    overlap_slowdown: float
    tables: Mapping[str, Table]

    def to_json(self) -> dict[str, Any]:
        return {"format": FORMAT, **asdict(self)}

    @staticmethod
    def from_json(data: Any) -> Profile:
        """Raises ValueError for what `to_json` cannot have made."""
        try:
            if data["format"] != FORMAT:
                raise ValueError(f"its format is {data['format']!r}, and not {FORMAT}")
            tables = {str(name): _table(table) for name, table in data["tables"].items()}
            numbers = [float(data[name]) for name in ("call_s", "overlap_slowdown")]
            if not all(0.0 <= x < 1e3 for x in numbers):
                raise ValueError(f"a number is out of range: {numbers}")
            return Profile(Hardware(**data["hardware"]), str(data["measured"]), numbers[0], numbers[1], tables)
        except (TypeError, KeyError, AttributeError, IndexError, OverflowError) as error:
            raise ValueError(f"something is missing or of another type: {type(error).__name__}: {error}") from error


def _table(data: Any) -> Table:
    axes = tuple(tuple(float(x) for x in axis) for axis in data["axes"])
    seconds = tuple(float(x) for x in data["seconds"])
    rising = all(axis and axis[0] > 0.0 and all(a < b < 1e300 for a, b in itertools.pairwise(axis)) for axis in axes)
    if not axes or not rising or len(seconds) != math.prod(map(len, axes)) or not all(0.0 < s < 1e6 for s in seconds):
        raise ValueError("a table is no grid of times")
    return Table(axes, seconds)


class Profiled:
    """Timings from a profile, and from the description of the cluster for what the profile lacks."""

    def __init__(self, profile: Profile, cluster: Cluster) -> None:
        self._tables = profile.tables
        self._described = Described(cluster)
        # A CPU worker computes in the thread that calls: its operators' times have the calls in them.
        self._call_s = profile.call_s
        self.host_s_per_launch = profile.call_s if profile.hardware.kind == "cuda" else 0.0
        self.overlap_slowdown = profile.overlap_slowdown
        self._streams = [self._tables.get(f"stream {op}") or self._tables.get(f"stream {_PLAIN}") for op in OPERATORS]

    def durations(self, work: Work, groups: Mapping[str, Group]) -> np.ndarray:
        """Seconds of each task; see `Timings`."""
        seconds = self._described.durations(work, groups)
        self._matmuls(work, seconds)
        self._attention(work, seconds)
        self._stream(work, seconds)
        self._messages(work, groups, seconds)
        return seconds

    def _matmuls(self, work: Work, seconds: np.ndarray) -> None:
        for code, precision in enumerate(PRECISIONS):
            at = np.flatnonzero((work.kind == _MATMUL) & (work.precision == code))
            table = self._tables.get(f"matmul {precision}")
            if not len(at) or table is None:
                continue
            m, n, k = work.m[at], work.n[at], work.k[at]
            products = work.flops[at] / np.maximum(2.0 * m * n * k, 1.0)
            one = table.at(m, n, k)
            more = np.maximum(one - self._call_s, 0.0) * np.maximum(products - 1.0, 0.0)  # of one call
            seconds[at] = one + more

    def _attention(self, work: Work, seconds: np.ndarray) -> None:
        chosen = (work.kind == _ATTENTION) & (work.bytes > 0)
        if not chosen.any():
            return
        for phase, precision in itertools.product(range(len(PHASES)), range(len(PRECISIONS))):
            at = np.flatnonzero(chosen & (work.phase == phase) & (work.precision == precision))
            name = "backward" if PHASES[phase] == "backward" else "forward"
            table = self._tables.get(f"attention {name} {PRECISIONS[precision]}")
            if len(at) and table is not None:
                seconds[at] = table.at(work.flops[at] / work.bytes[at], work.bytes[at])

    def _stream(self, work: Work, seconds: np.ndarray) -> None:
        streams = work.kind == _STREAM
        for code in np.unique(work.op[streams]):
            table = self._streams[int(code)]
            if table is not None:
                at = np.flatnonzero(streams & (work.op == code))
                launches = np.maximum(work.launches[at], 1.0)
                seconds[at] = launches * table.at(work.bytes[at] / launches)

    def _messages(self, work: Work, groups: Mapping[str, Group], seconds: np.ndarray) -> None:
        for kind, (axis, name) in itertools.product(MESSAGES, enumerate(AXES)):
            group = groups.get(name, Group(1))
            if group.size == 1 or group.nodes > 1:
                continue
            chosen = (work.kind == KINDS.index(kind)) & (work.axis == axis)
            for mode, of_mode in (("waited", work.until <= 1), ("started", work.until > 1)):
                at = np.flatnonzero(chosen & of_mode)
                if len(at):
                    found = self._message(kind, mode, group.size, work.message[at])
                    seconds[at] = seconds[at] if found is None else found

    def _message(self, kind: str, mode: str, size: int, message: np.ndarray) -> np.ndarray | None:
        """Of a group whose size was not measured: as the nearest one, by as much as the description differs."""
        sizes = [int(name.split()[1]) for name in self._tables if name.startswith(f"{kind} ")]
        if not sizes:
            return None
        nearest = min(sizes, key=lambda s: abs(math.log(s / size)))
        table = self._tables.get(f"{kind} {nearest} {mode}") or self._tables[f"{kind} {nearest} waited"]
        found = table.at(message)
        if nearest == size:
            return found
        here, there = (self._described.message_s(kind, message, Group(s, 1, s)) for s in (size, nearest))
        return found * here / np.maximum(there, 1e-12)
