"""What the tasks of a device take, by phase and by what it does meanwhile.

In: a device's Work, and what its tasks take (Timings). Out: a ledger: seconds that can be added, and multiplied with
numbers of layers and micro-batches; and of a whole ledger what the phases take.

    lanes      A device computes in one lane and sends in another. A message begins when computing reaches it; computing
               waits where its result is needed. What is waited for is exposed; a part of what is not slows computing.
    host       The calls of a phase take the host some time; the device works beside. Neither hides the other fully:
               the phase takes (host^p + device^p)^(1/p).
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from moai.plan.plan import Plan
from moai.plan.prediction import Parts
from moai.plan.timings import Group, Timings
from moai.plan.work import AXES, KINDS, MESSAGES, PHASES, Work

# The p of the soft maximum of host and device: at equal times a phase takes 1.19 times as long as either.
SOFTNESS = 4.0

# Columns of a ledger: seconds of a device's lanes in one phase, and of its host.
COMPUTE, RECOMPUTE, TP, DP, PP, SLOWDOWN, HOST = range(7)
_COLUMNS = 7
# Its phases. That of weights is what nobody waits for of the backward.
FORWARD, BACKWARD, WEIGHTS, OPTIMIZER = range(4)
_PHASES = 4
_ROW = np.array([{"forward": FORWARD, "backward": BACKWARD, "optimizer": OPTIMIZER}[phase] for phase in PHASES])
_FIRST_MESSAGE = KINDS.index(MESSAGES[0])
# Messages of a sequence's or experts' peers are within a layer, as those of its matrices' peers.
_EXPOSED = np.array([{"pp": PP, "tp": TP, "cp": TP, "ep": TP}.get(axis, DP) for axis in AXES])


def nothing() -> np.ndarray:
    """A ledger without seconds."""
    return np.zeros((2, 2, _PHASES, _COLUMNS))


def ledger_of(work: Work, plan: Plan, timings: Timings, groups: Mapping[str, Group]) -> np.ndarray:
    """Seconds of what is looped and of what is done once beside it, of what comes before the layers and of the rest,
    by phase and column."""
    seconds = timings.durations(work, groups)
    all_of_it = _walk(work, seconds, np.ones(len(seconds), dtype=np.bool_), timings)
    # With one micro-batch nothing needs a loop; its forward and backward are what the stages do in turn.
    looped = work.looped if plan.micro > 1 else work.phase != PHASES.index("optimizer")
    in_turn = _walk(work, seconds, looped, timings)
    return np.stack([in_turn, all_of_it - in_turn])


def _walk(work: Work, seconds: np.ndarray, chosen: np.ndarray, timings: Timings) -> np.ndarray:
    """Seconds of the chosen tasks, where they alone are done one after another."""
    rows = np.where(work.late, WEIGHTS, _ROW[work.phase])
    cells = (np.where(work.first, 0, _PHASES) + rows) * _COLUMNS
    size = 2 * _PHASES * _COLUMNS
    messages = (work.kind >= _FIRST_MESSAGE) & chosen
    computing = np.where((work.kind < _FIRST_MESSAGE) & chosen, seconds, 0.0)
    columns = np.where(work.recomputed, RECOMPUTE, COMPUTE)
    ledger = np.bincount(cells + columns, computing, size)
    ledger += np.bincount(cells + HOST, work.launches * chosen * timings.host_s_per_launch, size)
    if messages.any():
        at = np.flatnonzero(messages)
        exposed, slowdown = _exposed(work, seconds, computing, at, timings.overlap_slowdown)
        ledger += np.bincount(cells[at] + _EXPOSED[work.axis[at]], exposed, size)
        ledger += np.bincount(cells[at] + SLOWDOWN, slowdown, size)
    return ledger.reshape(2, _PHASES, _COLUMNS)


def _exposed(
    work: Work, seconds: np.ndarray, computing: np.ndarray, at: np.ndarray, share: float
) -> tuple[np.ndarray, np.ndarray]:
    """For the messages `at`: seconds that computing waits for each, and that it loses while it does not wait. Messages
    of one axis are sent one after another."""
    waited, beside = work.until[at] <= 1, np.zeros(len(at))
    exposed = np.where(waited, seconds[at], 0.0)
    # An axis whose messages are all waited for has none in flight: they are as good as computing.
    alone = waited & ~np.isin(work.axis[at], np.unique(work.axis[at[~waited]]))
    busy = computing.copy()
    busy[at[alone]] = seconds[at[alone]]
    elapsed = [0.0, *np.cumsum(busy).tolist()]
    later = 0.0  # than `elapsed` says, for what was waited for
    free = [0.0] * len(AXES)
    flying: list[tuple[int, int, float]] = []
    events = np.flatnonzero(~alone)
    n = len(seconds)
    starts = at[events].tolist()
    dues = np.minimum(at[events] + np.maximum(work.until[at[events]], 1), n).tolist()
    axes, lasting = work.axis[at[events]].tolist(), seconds[at[events]].tolist()
    for number, start in enumerate([*starts, n + 1]):
        while flying and flying[0][0] <= start:
            due, which, end = heapq.heappop(flying)
            wait = max(0.0, end - (elapsed[due] + later))
            lost = share * max(0.0, lasting[which] - wait)
            exposed[events[which]], beside[events[which]] = wait, lost
            later += wait + lost
        if number < len(starts):
            axis = axes[number]
            free[axis] = max(free[axis], elapsed[start] + later) + lasting[number]
            heapq.heappush(flying, (dues[number], number, free[axis]))
    return exposed, beside


@dataclass(frozen=True, slots=True)
class Times:
    """A device's columns of one micro-batch and of what is done once, with what the host adds in place of its own
    seconds; and the seconds of a micro-batch's phases."""

    looped: np.ndarray
    once: np.ndarray
    phases: np.ndarray

    @staticmethod
    def of(ledger: np.ndarray) -> Times:
        # Differences of two waits can be less than nothing.
        looped, last = (_with_host(np.maximum(x, 0.0)) for x in (ledger[0], ledger[0] + ledger[1]))
        return Times(looped, last - looped, looped.sum(axis=1))

    @property
    def looped_s(self) -> float:
        return float(self.looped.sum())

    @property
    def once_s(self) -> float:
        return float(self.once.sum())


def _with_host(ledger: np.ndarray) -> np.ndarray:
    """Columns by phase, with the host's own seconds replaced by those that it adds to the device's."""
    columns = ledger.sum(axis=0)
    device, host = columns[:, :HOST].sum(axis=1), columns[:, HOST]
    columns[:, HOST] = (device**SOFTNESS + host**SOFTNESS) ** (1 / SOFTNESS) - device
    return columns


def looped_s(ledger: np.ndarray) -> float:
    """Seconds of a micro-batch."""
    return float(_with_host(ledger[0]).sum())


def parts_of(columns: np.ndarray, bubble: float, waited: float = 0.0) -> Parts:
    """Parts of a step from columns by phase. `waited`: seconds, for stages' messages."""
    compute, sums = columns[:, COMPUTE], columns.sum(axis=0)
    return Parts(
        forward=float(compute[FORWARD]),
        backward=float(compute[BACKWARD] + compute[WEIGHTS]),
        recompute=float(sums[RECOMPUTE]),
        optimizer=float(compute[OPTIMIZER]),
        host=float(sums[HOST]),
        tp_exposed=float(sums[TP]),
        dp_exposed=float(sums[DP]),
        pp_exposed=float(sums[PP]) + waited,
        slowdown=float(sums[SLOWDOWN]),
        bubble=bubble,
    )
