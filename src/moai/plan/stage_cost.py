"""What a step costs in a pipeline whose stages were looked at.

In: what the devices of the first stage, of the last one and of those between do (Stages), the plan, and what tasks take
(Timings). Out: a Prediction.

    layers     Stages grow and shrink by what a layer more does. Layers are dealt to them one by one: to the stage that
               is soonest done and has room for it.
    time       The stages' parts of all micro-batches are played in the schedule's order. What one makes is with the
               other as much later as the message takes, which slows computing meanwhile.
    memory     A device holds its stages' parameters, gradients and states, what the stage that works holds for one
               micro-batch, and what all micro-batches under way have left.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from moai.plan.ledger import (
    BACKWARD,
    FORWARD,
    HOST,
    OPTIMIZER,
    SLOWDOWN,
    WEIGHTS,
    Times,
    ledger_of,
    looped_s,
    nothing,
    parts_of,
)
from moai.plan.plan import Plan, Schedule
from moai.plan.prediction import Prediction, Stage
from moai.plan.schedule import finish, put_off, under_way
from moai.plan.timings import Group, Timings
from moai.plan.work import Memory, Sample, Stages, StageWork, Task, Work

# Of the host, for a message to the next stage: to send, to receive, and to wait for either.
CALLS_OF_A_HOP = 4

T = TypeVar("T", float, np.ndarray)


def predicted(
    stages: Stages,
    plan: Plan,
    timings: Timings,
    groups: Mapping[str, Group],
    dealt: Sequence[int] | None,
    budget_bytes: float,
) -> Prediction:
    """See `cost.predict`."""
    layer, ends = _ledgers(stages, plan, timings, groups)
    if dealt is None:
        most = _most_layers(stages, plan, budget_bytes)
        dealt = deal([looped_s(end) for end in ends], looped_s(layer), stages.layers, most)
    times = [Times.of(end + n * layer) for end, n in zip(ends, dealt, strict=True)]
    memories = [_memory(stages, plan, device, dealt) for device in range(plan.pp)]
    found = [_stage(n, its, memories[at % plan.pp]) for at, (n, its) in enumerate(zip(dealt, times, strict=True))]
    each = [found[device :: plan.pp] for device in range(plan.pp)]
    seconds, hop_s = [seconds_of_parts(own, plan.schedule) for own in each], hop_s_of(stages, timings, groups)
    chunks = plan.n_stages // plan.pp
    at_once = finish(plan.schedule, plan.micro, seconds, 0.0, chunks)
    ended = finish(plan.schedule, plan.micro, seconds, hop_s, chunks) if hop_s else at_once
    busiest = max((np.sum([t.looped for t in times[at :: plan.pp]], axis=0) for at in range(plan.pp)), key=np.sum)
    latest = max((np.sum([t.once for t in times[at :: plan.pp]], axis=0) for at in range(plan.pp)), key=np.sum)
    bubble = at_once - plan.micro * float(busiest.sum())
    parts = parts_of(plan.micro * busiest + latest, bubble, ended - at_once)
    return Prediction(parts.total, parts, max(memories, key=lambda memory: memory.total), tuple(found), hop_s)


def _stage(n: int, its: Times, memory: Memory) -> Stage:
    phases = its.phases
    backward = float(phases[[BACKWARD, WEIGHTS, OPTIMIZER]].sum())
    return Stage(n, float(phases[FORWARD]), backward, float(phases[WEIGHTS]), its.once_s, memory)


def seconds_of_parts(own: Sequence[Stage], schedule: Schedule) -> list[float]:
    """Of the parts that a device's passes have, whose stages are `own`."""
    if schedule == "zero_bubble":
        (stage,) = own
        return [stage.forward_s, stage.backward_s - stage.weights_s, stage.weights_s]
    return [stage.forward_s for stage in own] + [stage.backward_s for stage in reversed(own)]


# -- seconds


def _ledgers(
    stages: Stages, plan: Plan, timings: Timings, groups: Mapping[str, Group]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ledger of a layer, and that of each stage without its layers."""
    first, middle, deeper, last = (
        ledger_of(each.work, plan, timings, groups)
        for each in (stages.first, stages.middle, stages.deeper, stages.last)
    )
    layer = (deeper - middle) / (stages.deeper.layers - stages.middle.layers)
    begin = first - stages.first.layers * layer
    between = middle - stages.middle.layers * layer
    end = last - stages.last.layers * layer
    beside = nothing()
    beside[0, 1, [FORWARD, BACKWARD], HOST] = CALLS_OF_A_HOP * timings.host_s_per_launch
    beside[0, 1, [FORWARD, BACKWARD], SLOWDOWN] = hop_s_of(stages, timings, groups) * timings.overlap_slowdown
    return layer, [each + beside for each in (begin, *[between] * (plan.n_stages - 2), end)]


def hop_s_of(sample: Sample | Stages, timings: Timings, groups: Mapping[str, Group]) -> float:
    """Seconds that a message from a stage to the next takes."""
    if not sample.handed:
        return 0.0
    task = Task("send", "forward", message=sample.handed, axis="pp")
    return float(timings.durations(Work.of([task], Memory(), 1.0), groups)[0])


def deal(ends: Sequence[float], layer: float, n_layers: int, most: Sequence[float]) -> list[int]:
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


# -- memory


@dataclass(frozen=True, slots=True)
class _Grown:
    """What a device of a stage with so many layers does and holds."""

    kind: StageWork
    stages: Stages
    n: float

    @staticmethod
    def of(stages: Stages, plan: Plan, stage: int, n: float) -> _Grown:
        kind = stages.first if stage == 0 else stages.last if stage == plan.n_stages - 1 else stages.middle
        return _Grown(kind, stages, n)

    def of_it(self, value: Callable[[StageWork], T]) -> T:
        """What the value of a StageWork is."""
        few, many = self.stages.middle, self.stages.deeper
        more = (self.n - self.kind.layers) / (many.layers - few.layers)
        return value(self.kind) + more * (value(many) - value(few))

    def stored(self) -> np.ndarray:
        """Bytes, at each place, that are held whatever the stage does."""
        found = self.of_it(lambda each: each.held.gradients + each.held.parameters + each.held.states)
        return np.maximum(found, 0.0)


def _most_layers(stages: Stages, plan: Plan, budget_bytes: float) -> list[float]:
    """How many layers each stage has room for, where a device's stages have equal parts of it."""
    if budget_bytes == math.inf:
        return [math.inf] * plan.n_stages
    chunks = plan.n_stages // plan.pp
    found = []
    for stage in range(plan.n_stages):
        empty, one = (_alone(_Grown.of(stages, plan, stage, n), plan, stage % plan.pp) for n in (0.0, 1.0))
        found.append(float(np.min((budget_bytes / chunks - empty) / np.maximum(one - empty, 1.0))))
    return [float(math.floor(n)) for n in found]


def _alone(its: _Grown, plan: Plan, device: int) -> np.ndarray:
    """What a stage holds at each place, with its part of what its device has under way."""
    ahead, late = _waiting(plan, device) * plan.pp / plan.n_stages, put_off(plan.schedule, device, plan.micro)
    return its.of_it(lambda each: each.held.total + ahead * each.waiting + late * each.late)


def _waiting(plan: Plan, device: int) -> int:
    """Micro-batches of a device's stages that are under way beside the one at work."""
    return under_way(plan.schedule, device, plan.pp, plan.micro, plan.n_stages // plan.pp) - 1


def _memory(stages: Stages, plan: Plan, device: int, dealt: Sequence[int]) -> Memory:
    """What a device holds where it holds the most."""
    own = [_Grown.of(stages, plan, stage, dealt[stage]) for stage in range(device, plan.n_stages, plan.pp)]
    waiting = _waiting(plan, device) / len(own)
    stored = [each.stored() for each in own]
    working = [each.of_it(lambda x: x.held.total) - still for each, still in zip(own, stored, strict=True)]
    ahead = waiting * np.sum([each.of_it(lambda x: x.waiting) for each in own], axis=0)
    ahead += put_off(plan.schedule, device, plan.micro) * sum(each.of_it(lambda x: x.late) for each in own)
    total = np.sum(stored, axis=0) + np.max(working, axis=0) + ahead
    place = int(np.argmax(total))

    def summed(value: Callable[[StageWork], float]) -> float:
        return sum(max(0.0, each.of_it(value)) for each in own)

    parameters, states = summed(lambda x: x.held.parameters), summed(lambda x: x.held.states)
    gradients = summed(lambda x: float(x.held.gradients[place]))
    at_work = own[int(np.argmax([each[place] for each in working]))]
    activations = max(0.0, at_work.of_it(lambda x: float(x.held.activations[place]))) + float(ahead[place])
    rest = float(total[place]) - parameters - states - gradients - activations
    return Memory(parameters, gradients, states, activations, rest)
