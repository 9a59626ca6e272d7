"""What a step of a model costs under a plan: seconds by part, and the memory of the fullest device.

In: the model's work on one device (a Sample), or on the devices of its stages (Stages), the plan, and what its tasks
take (Timings). Out: a Prediction, read by the search and printed by the commands.

    lanes      A device computes in one lane and sends in another. A message begins when computing reaches it; computing
               waits where its result is needed. What is waited for is exposed; a part of what is not slows computing.
    host       The calls of a phase take the host some time; the device works beside. Neither hides the other fully:
               the phase takes (host^p + device^p)^(1/p).
    layers     The model's costs are those of few layers, and for each layer more the difference of one layer more.
    micro      What is looped is done in each micro-batch. The rest meets the last one.
    stages     Stage s takes t(s) for a micro-batch. m of them take m * slowest + (all - slowest) / v, where each device
               has v chunks of the layers: the bubble of 1F1B and of its interleaved form (Narayanan et al., "Efficient
               Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC21, sections 2.2.1, 2.2.2).
    memory     Stage s of 1F1B holds the activations of min(m, S - s) micro-batches (the same, section 2.2.1).
    layers     They are dealt to stages one by one: to the one that is soonest done and has room for it.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from moai.plan.plan import Plan
from moai.plan.timings import Group, Timings
from moai.plan.work import AXES, KINDS, MESSAGES, PHASES, Memory, Sample, Stages, StageWork, Task, Work

# The p of the soft maximum of host and device: at equal times a phase takes 1.19 times as long as either.
SOFTNESS = 4.0

# Plans whose predicted times differ by less than this share are not told apart: of them the one with the fewest stages
# is the safer choice, since a bubble has the errors of all stages in it.
INDISTINCT = 0.02

# Of the host, for a message to the next stage: to send, to receive, and to wait for either.
_CALLS_OF_A_HOP = 4

# Columns of a ledger: seconds of a device's lanes in one phase, and of its host.
_COMPUTE, _RECOMPUTE, _TP, _DP, _PP, _SLOWDOWN, _HOST = range(7)
_COLUMNS = 7
_FORWARD, _BACKWARD, _OPTIMIZER = range(len(PHASES))
_FIRST_MESSAGE = KINDS.index(MESSAGES[0])
# Messages of a sequence's or experts' peers are within a layer, as those of its matrices' peers.
_EXPOSED = np.array([{"pp": _PP, "tp": _TP, "cp": _TP, "ep": _TP}.get(axis, _DP) for axis in AXES])


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of a step; their sum is the step. `host`: what waiting for calls adds; `tp_exposed`: messages within
    layers that computing waits for; `dp_exposed`: those of gradients and of sharded states; `pp_exposed`: those
    between stages; `slowdown`: what computing loses to messages beside it; `bubble`: waiting for other stages."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0
    optimizer: float = 0.0
    host: float = 0.0
    tp_exposed: float = 0.0
    dp_exposed: float = 0.0
    pp_exposed: float = 0.0
    slowdown: float = 0.0
    bubble: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage. Seconds of a micro-batch's forward and backward, and of what is done once a step."""

    layers: int
    forward_s: float
    backward_s: float
    once_s: float
    memory: Memory


@dataclass(frozen=True, slots=True)
class Prediction:
    """A step's time and its parts; the memory of the stage that holds the most; the stages, first one first."""

    step_s: float
    parts: Parts
    memory: Memory
    stages: tuple[Stage, ...]


def predict(
    sample: Sample | Stages,
    plan: Plan,
    timings: Timings,
    groups: Mapping[str, Group],
    *,
    interleave: int = 1,
    dealt: Sequence[int] | None = None,
    budget_bytes: float = math.inf,
) -> Prediction:
    """The step of the model that `sample` describes. `interleave`: chunks of layers a device has, of the v of 1F1B's
    interleaved form. `dealt`: how many layers each stage has; without it they are dealt so that the slowest stage is as
    fast as can be where no device holds more than `budget_bytes`, if there is such a way.

    Raises ValueError where there are not enough layers for the stages.
    """
    if isinstance(sample, Stages):
        layer, ends = _ledgers_of_stages(sample, plan, timings, groups)
        n_layers, most = sample.layers, _most_layers(sample, plan, budget_bytes)
    else:
        layer, ends = _ledgers(sample, plan, timings, groups)
        n_layers, most = sample.layers + sample.deeper, [math.inf] * plan.pp
    hops = _hops(sample, plan, timings, groups, interleave)
    ends = [end + hops for end in ends]
    if dealt is None:
        dealt = _deal([_looped_s(end) for end in ends], _looped_s(layer), n_layers, most)
    elif len(dealt) != plan.pp or sum(dealt) != n_layers:
        raise ValueError(f"{list(dealt)} does not deal {n_layers} layers to {plan.pp} stages.")
    times = [_Times.of(end + n * layer) for end, n in zip(ends, dealt, strict=True)]
    if isinstance(sample, Stages):
        memories = [_stage_memory(sample, plan, s, n) for s, n in enumerate(dealt)]
    else:
        memories = [_memory(sample, plan, interleave, s, n) for s, n in enumerate(dealt)]
    slowest = max(times, key=lambda stage: stage.looped_s)
    latest = max(times, key=lambda stage: stage.once_s)
    bubble = (sum(stage.looped_s for stage in times) - slowest.looped_s) / interleave
    parts = _parts(plan.micro * slowest.looped + latest.once, bubble)
    stages = [
        Stage(n, float(t.phases[_FORWARD]), float(t.phases[_BACKWARD]), t.once_s, memory)
        for n, t, memory in zip(dealt, times, memories, strict=True)
    ]
    return Prediction(parts.total, parts, max(memories, key=lambda memory: memory.total), tuple(stages))


def _ledgers(
    sample: Sample, plan: Plan, timings: Timings, groups: Mapping[str, Group]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ledger of a layer, and that of each stage without its layers."""
    less, more = (_ledger(work, plan, timings, groups) for work in (sample.less, sample.more))
    layer = more - less
    rest = less - sample.layers * layer
    first = np.zeros_like(rest)
    first[:, 0], rest[:, 0] = rest[:, 0], 0.0
    return layer, [(s == 0) * first + (s == plan.pp - 1) * rest for s in range(plan.pp)]


def _ledgers_of_stages(
    stages: Stages, plan: Plan, timings: Timings, groups: Mapping[str, Group]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The same, of a pipeline that was looked at."""
    first, middle, deeper, last = (
        _ledger(each.work, plan, timings, groups) for each in (stages.first, stages.middle, stages.deeper, stages.last)
    )
    layer = (deeper - middle) / (stages.deeper.layers - stages.middle.layers)
    begin = first - stages.first.layers * layer
    between = middle - stages.middle.layers * layer
    end = last - stages.last.layers * layer
    return layer, [begin, *[between] * (plan.pp - 2), end]


def _ledger(work: Work, plan: Plan, timings: Timings, groups: Mapping[str, Group]) -> np.ndarray:
    """Seconds of what is looped and of what is done once beside it, of what comes before the layers and of the rest,
    by phase and column."""
    seconds = timings.durations(work, groups)
    all_of_it = _walk(work, seconds, np.ones(len(seconds), dtype=np.bool_), timings)
    # With one micro-batch nothing needs a loop; its forward and backward are what the stages do in turn.
    looped = work.looped if plan.micro > 1 else work.phase != _OPTIMIZER
    in_turn = _walk(work, seconds, looped, timings)
    return np.stack([in_turn, all_of_it - in_turn])


def _walk(work: Work, seconds: np.ndarray, chosen: np.ndarray, timings: Timings) -> np.ndarray:
    """Seconds of the chosen tasks, where they alone are done one after another."""
    cells = (np.where(work.first, 0, len(PHASES)) + work.phase) * _COLUMNS
    size = 2 * len(PHASES) * _COLUMNS
    messages = (work.kind >= _FIRST_MESSAGE) & chosen
    computing = np.where((work.kind < _FIRST_MESSAGE) & chosen, seconds, 0.0)
    columns = np.where(work.recomputed, _RECOMPUTE, _COMPUTE)
    ledger = np.bincount(cells + columns, computing, size)
    ledger += np.bincount(cells + _HOST, work.launches * chosen * timings.host_s_per_launch, size)
    if messages.any():
        at = np.flatnonzero(messages)
        exposed, slowdown = _exposed(work, seconds, computing, at, timings.overlap_slowdown)
        ledger += np.bincount(cells[at] + _EXPOSED[work.axis[at]], exposed, size)
        ledger += np.bincount(cells[at] + _SLOWDOWN, slowdown, size)
    return ledger.reshape(2, len(PHASES), _COLUMNS)


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
class _Times:
    """A stage's columns of one micro-batch and of what is done once, with what the host adds in place of its own
    seconds; and the seconds of a micro-batch's phases."""

    looped: np.ndarray
    once: np.ndarray
    phases: np.ndarray

    @staticmethod
    def of(ledger: np.ndarray) -> _Times:
        # Differences of two waits can be less than nothing.
        looped, last = (_with_host(np.maximum(x, 0.0)) for x in (ledger[0], ledger[0] + ledger[1]))
        return _Times(looped, last - looped, looped.sum(axis=1))

    @property
    def looped_s(self) -> float:
        return float(self.looped.sum())

    @property
    def once_s(self) -> float:
        return float(self.once.sum())


def _with_host(ledger: np.ndarray) -> np.ndarray:
    """Columns by phase, with the host's own seconds replaced by those that it adds to the device's."""
    columns = ledger.sum(axis=0)
    device, host = columns[:, :_HOST].sum(axis=1), columns[:, _HOST]
    columns[:, _HOST] = (device**SOFTNESS + host**SOFTNESS) ** (1 / SOFTNESS) - device
    return columns


def _looped_s(ledger: np.ndarray) -> float:
    """Seconds of a micro-batch."""
    return float(_with_host(ledger[0]).sum())


def _parts(columns: np.ndarray, bubble: float) -> Parts:
    """Parts of a step from columns by phase."""
    compute, sums = columns[:, _COMPUTE], columns.sum(axis=0)
    return Parts(
        forward=float(compute[_FORWARD]),
        backward=float(compute[_BACKWARD]),
        recompute=float(sums[_RECOMPUTE]),
        optimizer=float(compute[_OPTIMIZER]),
        host=float(sums[_HOST]),
        tp_exposed=float(sums[_TP]),
        dp_exposed=float(sums[_DP]),
        pp_exposed=float(sums[_PP]),
        slowdown=float(sums[_SLOWDOWN]),
        bubble=bubble,
    )


def _hops(
    sample: Sample | Stages, plan: Plan, timings: Timings, groups: Mapping[str, Group], interleave: int
) -> np.ndarray:
    """The columns of a stage's messages to its neighbours: for each chunk of layers one forward and one backward. With
    several chunks a stage computes another one meanwhile."""
    ledger = np.zeros((2, 2, len(PHASES), _COLUMNS))
    if plan.pp > 1 and sample.handed:
        task = Task("send", "forward", message=sample.handed, axis="pp")
        seconds = float(timings.durations(Work.of([task], Memory(), 1.0), groups)[0])
        ledger[0, 1, :_OPTIMIZER, _HOST] = interleave * _CALLS_OF_A_HOP * timings.host_s_per_launch
        if interleave == 1:
            ledger[0, 1, :_OPTIMIZER, _PP] = seconds
        else:
            ledger[0, 1, :_OPTIMIZER, _SLOWDOWN] = interleave * seconds * timings.overlap_slowdown
    return ledger


def _deal(ends: Sequence[float], layer: float, n_layers: int, most: Sequence[float]) -> list[int]:
    """How many of `n_layers` equal layers each stage has beside what its end takes: one after another to the stage that
    is the soonest done with it, which for equal layers makes the slowest stage as fast as can be. A stage has room for
    `most` of them; what nobody has room for is dealt all the same."""
    if len(ends) > 1 and n_layers < len(ends):
        raise ValueError(f"{n_layers} repeating layers cannot be dealt to {len(ends)} pipeline stages.")
    dealt = [int(len(ends) > 1)] * len(ends)  # a stage without layers would be none
    queue = [(end + dealt[s] * layer, s) for s, end in enumerate(ends)]
    heapq.heapify(queue)
    full = []
    for _ in range(n_layers - sum(dealt)):
        while queue and dealt[queue[0][1]] >= most[queue[0][1]]:
            full.append(heapq.heappop(queue))
        if not queue:
            queue, most = full, [math.inf] * len(ends)
            heapq.heapify(queue)
        seconds, s = queue[0]
        dealt[s] += 1
        heapq.heapreplace(queue, (seconds + layer, s))
    return dealt


def _held_by(stages: Stages, plan: Plan, stage: int) -> tuple[np.ndarray, np.ndarray]:
    """What a device of a stage without layers would hold at each place, and what it holds for each layer."""
    kind, ahead = _kind(stages, plan, stage), _in_flight(plan, 1, stage) - 1
    few, many = stages.middle, stages.deeper
    layer = (many.held.total - few.held.total + ahead * (many.waiting - few.waiting)) / (many.layers - few.layers)
    return kind.held.total + ahead * kind.waiting - kind.layers * layer, layer


def _kind(stages: Stages, plan: Plan, stage: int) -> StageWork:
    return stages.first if stage == 0 else stages.last if stage == plan.pp - 1 else stages.middle


def _most_layers(stages: Stages, plan: Plan, budget_bytes: float) -> list[float]:
    """How many layers each stage has room for."""
    if budget_bytes == math.inf:
        return [math.inf] * plan.pp
    found = []
    for stage in range(plan.pp):
        beside, layer = _held_by(stages, plan, stage)
        found.append(float(np.min((budget_bytes - beside) / np.maximum(layer, 1.0))))
    return [float(math.floor(n)) for n in found]


def _stage_memory(stages: Stages, plan: Plan, stage: int, n_layers: int) -> Memory:
    """What a device of a stage holds where it holds the most."""
    kind, few, many = _kind(stages, plan, stage), stages.middle, stages.deeper
    beside, layer = _held_by(stages, plan, stage)
    place = int(np.argmax(beside + n_layers * layer))
    more = (n_layers - kind.layers) / (many.layers - few.layers)

    def grown(value: Callable[[StageWork], float]) -> float:
        return max(0.0, value(kind) + more * (value(many) - value(few)))

    ahead = _in_flight(plan, 1, stage) - 1
    parameters, states = grown(lambda each: each.held.parameters), grown(lambda each: each.held.states)
    gradients = grown(lambda each: float(each.held.gradients[place]))
    activations = grown(lambda each: float(each.held.activations[place] + ahead * each.waiting[place]))
    total = float(beside[place] + n_layers * layer[place])
    return Memory(parameters, gradients, states, activations, total - parameters - states - gradients - activations)


def _memory(sample: Sample, plan: Plan, interleave: int, stage: int, n_layers: int) -> Memory:
    """What a device of a stage holds at the most. What lies beside the layers is held for one micro-batch at a time."""
    layer = sample.more.memory + sample.less.memory * -1.0
    beside = sample.less.memory + layer * -float(sample.layers)
    if plan.pp > 1:
        before = beside if sample.before is None else sample.before
        behind = beside if sample.before is None else beside + sample.before * -1.0
        nothing = Memory(buffers=beside.buffers)
        beside = {0: before, plan.pp - 1: behind}.get(stage, nothing)
        beside = replace(beside, buffers=nothing.buffers)
    held = layer * float(n_layers)
    in_flight = _in_flight(plan, interleave, stage)
    return beside + replace(held, activations=held.activations * in_flight)


def _in_flight(plan: Plan, interleave: int, stage: int) -> float:
    """Micro-batches whose activations a stage holds at once. A stage of several chunks has begun so many of them
    before its first backward (Narayanan et al., SC21; Megatron-LM, `schedules.py`)."""
    if plan.schedule == "gpipe":
        return plan.micro
    behind = plan.pp - stage
    if interleave == 1:
        return min(plan.micro, behind)
    return min(plan.micro * interleave, 2 * (behind - 1) + (interleave - 1) * plan.pp + 1) / interleave
