"""What tasks took in their place, within a step of a model, and what follows from it for others.

In: tasks that were timed while a few layers of a model ran under several plans (`profiling.layers`), and the times that
tables say for the same. Out: for each task of a Work the factor by which it differs from its tables: that of the timed
task which is the nearest of its kind. So one that was timed itself takes what it took then, and one of another size
is as much faster or slower than its tables as its neighbour was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from moai.plan.timings import Group
from moai.plan.work import AXES, KINDS, MESSAGES, OPERATORS, PHASES, PRECISIONS, Memory, Task, Work

if TYPE_CHECKING:
    from moai.graph.step_graph import Phase

_AXIS = "dp"  # that timed messages are put on; how many devices there are is what counts
_MOST_DEVICES = 1 << 20
_FIRST_MESSAGE = KINDS.index(MESSAGES[0])
_BACKWARD = PHASES.index("backward")
# Which of them a task is counts, but by its size.
_SIZES = ("m", "n", "k", "flops", "bytes", "message")
# Logarithms of sizes, which may be interpolated, are the same up to this.
_SAME = 1e-4

Tables = Callable[[Work, Mapping[str, Group]], np.ndarray]


class TimedTask(NamedTuple):
    """A task as in `Task`, and the `seconds` that it took once. `behind`: of the backward, and not computed again;
    `group`: devices that a message goes to (1 for none); `started`: a device computed beside it; `looped`: it was sent
    in each of several micro-batches."""

    kind: str
    op: str
    precision: str
    behind: bool
    group: int
    started: bool
    looped: bool
    m: float
    n: float
    k: float
    flops: float
    bytes: float
    message: float
    seconds: float

    @property
    def which(self) -> TimedTask:
        """All but the seconds."""
        return self._replace(seconds=0.0)

    @staticmethod
    def from_json(data: Any) -> TimedTask:
        """Raises ValueError, TypeError or KeyError for what cannot be one."""
        found = TimedTask(*data)
        numbers = [float(x) for x in (found.group, *found[TimedTask._fields.index("m") :])]
        known = found.kind in KINDS and found.op in OPERATORS and found.precision in PRECISIONS
        if not known or not all(0.0 <= x < 1e300 for x in numbers) or not 0.0 < found.seconds < 1e6:
            raise ValueError(f"{data!r} is no task that was timed")
        return found


def timed(task: Task, seconds: float, group: int) -> TimedTask:
    """`task`, whose axis has `group` devices."""
    message = task.kind in MESSAGES
    sizes = {size: float(getattr(task, size)) for size in _SIZES}
    behind = task.phase == "backward" and not task.recomputed and not message
    return TimedTask(
        task.kind,
        task.op,
        task.precision,
        behind,
        group=group if message else 1,
        started=message and task.until > 1,
        looped=message and task.looped,
        **sizes,
        seconds=seconds,
    )


class InPlace:
    """See the module docstring."""

    def __init__(self, tasks: Sequence[TimedTask], tables: Tables) -> None:
        self._near: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for size in sorted({task.group for task in tasks}):
            self._learn([task for task in tasks if task.group == size], {_AXIS: Group(size, 1, size)}, tables)

    def _learn(self, tasks: Sequence[TimedTask], groups: Mapping[str, Group], tables: Tables) -> None:
        work = Work.of([_task(task) for task in tasks], Memory())
        factors = np.array([task.seconds for task in tasks]) / np.maximum(tables(work, groups), 1e-12)
        which, places = _which(work, groups), _places(work)
        for number in np.unique(which).tolist():
            at = which == number
            self._near[number] = (places[at], factors[at])

    def factors(self, work: Work, groups: Mapping[str, Group]) -> tuple[np.ndarray, np.ndarray]:
        """For each task what its tables' seconds are multiplied with, and whether it was timed itself."""
        factors, exact = np.ones(len(work.kind)), np.zeros(len(work.kind), dtype=np.bool_)
        if not self._near:
            return factors, exact
        which, places = _which(work, groups), _places(work)
        for number in np.unique(which).tolist():
            if number in self._near:
                near, theirs = self._near[number]
                at = np.flatnonzero(which == number)
                apart = np.abs(places[at, None, :] - near[None]).sum(axis=2)
                nearest = apart.argmin(axis=1)
                factors[at] = theirs[nearest]
                exact[at] = apart[np.arange(len(at)), nearest] < _SAME
        return factors, exact


def _places(work: Work) -> np.ndarray:
    return np.stack([np.log1p(getattr(work, size)) for size in _SIZES], axis=1)


def _which(work: Work, groups: Mapping[str, Group]) -> np.ndarray:
    """A number for each task, the same for those that differ in size only."""
    message = work.kind >= _FIRST_MESSAGE
    sizes = np.array([groups.get(axis, Group(1)).size for axis in AXES])
    behind = (work.phase == _BACKWARD) & ~work.recomputed & ~message
    group = np.where(message, sizes[work.axis], 1)
    found = (work.kind * len(OPERATORS) + work.op) * len(PRECISIONS) + work.precision
    found = found * _MOST_DEVICES + np.minimum(group, _MOST_DEVICES - 1)
    return ((found * 2 + behind) * 2 + (message & (work.until > 1))) * 2 + (message & work.looped)


def _task(task: TimedTask) -> Task:
    sizes = {size: getattr(task, size) for size in _SIZES}
    phase: Phase = "backward" if task.behind else "forward"
    until = 2 if task.started else 1
    return Task(task.kind, phase, task.precision, axis=_AXIS, until=until, looped=task.looped, op=task.op, **sizes)
