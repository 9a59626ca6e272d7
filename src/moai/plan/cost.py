"""What a step of a model costs under a plan: seconds by part, and the memory of the fullest device.

In: the model's work on one device (a Sample), or on the devices of its stages (Stages), the plan, and what its tasks
take (Timings). Out: a Prediction. Of Stages, see `stage_cost`; of a Sample:

    layers     The model's costs are those of few layers, and for each layer more the difference of one layer more.
    micro      What is looped is done in each micro-batch. The rest meets the last one.
    stages     Stage s takes t(s) for a micro-batch. m of them take m * slowest + (all - slowest) / v, where each device
               has v chunks of the layers: the bubble of 1F1B and of its interleaved form (Narayanan et al., "Efficient
               Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", SC21, sections 2.2.1, 2.2.2).
    memory     Stage s holds the activations of as many micro-batches as its schedule has under way there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from moai.plan import stage_cost
from moai.plan.ledger import BACKWARD, FORWARD, HOST, PP, SLOWDOWN, Times, ledger_of, looped_s, nothing, parts_of
from moai.plan.plan import Plan
from moai.plan.prediction import Prediction, Stage
from moai.plan.schedule import under_way
from moai.plan.timings import Group, Timings
from moai.plan.work import Memory, Sample, Stages

# Plans whose predicted times differ by less than this share are not told apart: of them the one with the fewest stages
# is the safer choice, since a bubble has the errors of all stages in it.
INDISTINCT = 0.02


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
    """The step of the model that `sample` describes. `interleave`: chunks of layers that a device of a Sample has, of
    the v of 1F1B's interleaved form. `dealt`: how many layers each stage has; without it they are dealt so that the
    slowest stage is as fast as can be where no device holds more than `budget_bytes`, if there is such a way.

    Raises ValueError where there are not enough layers for the stages.
    """
    n_layers = sample.layers if isinstance(sample, Stages) else sample.layers + sample.deeper
    n_stages = plan.n_stages if isinstance(sample, Stages) else plan.pp
    if dealt is not None and (len(dealt) != n_stages or sum(dealt) != n_layers):
        raise ValueError(f"{list(dealt)} does not deal {n_layers} layers to {n_stages} stages.")
    if isinstance(sample, Stages):
        return stage_cost.predicted(sample, plan, timings, groups, dealt, budget_bytes)
    layer, ends = _ledgers(sample, plan, timings, groups)
    hops = _hops(sample, plan, timings, groups, interleave)
    ends = [end + hops for end in ends]
    if dealt is None:
        dealt = stage_cost.deal([looped_s(end) for end in ends], looped_s(layer), n_layers, [math.inf] * plan.pp)
    times = [Times.of(end + n * layer) for end, n in zip(ends, dealt, strict=True)]
    memories = [_memory(sample, plan, interleave, s, n) for s, n in enumerate(dealt)]
    slowest = max(times, key=lambda stage: stage.looped_s)
    latest = max(times, key=lambda stage: stage.once_s)
    bubble = (sum(stage.looped_s for stage in times) - slowest.looped_s) / interleave
    parts = parts_of(plan.micro * slowest.looped + latest.once, bubble)
    stages = [
        Stage(n, float(t.phases[FORWARD]), float(t.phases[BACKWARD]), 0.0, t.once_s, memory)
        for n, t, memory in zip(dealt, times, memories, strict=True)
    ]
    return Prediction(parts.total, parts, max(memories, key=lambda memory: memory.total), tuple(stages))


def _ledgers(
    sample: Sample, plan: Plan, timings: Timings, groups: Mapping[str, Group]
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ledger of a layer, and that of each stage without its layers."""
    less, more = (ledger_of(work, plan, timings, groups) for work in (sample.less, sample.more))
    layer = more - less
    rest = less - sample.layers * layer
    first = np.zeros_like(rest)
    first[:, 0], rest[:, 0] = rest[:, 0], 0.0
    return layer, [(s == 0) * first + (s == plan.pp - 1) * rest for s in range(plan.pp)]


def _hops(sample: Sample, plan: Plan, timings: Timings, groups: Mapping[str, Group], interleave: int) -> np.ndarray:
    """The columns of a stage's messages to its neighbours: for each chunk of layers one forward and one backward. With
    several chunks a stage computes another one meanwhile."""
    ledger = nothing()
    if plan.pp > 1 and sample.handed:
        seconds = stage_cost.hop_s_of(sample, timings, groups)
        ways = [FORWARD, BACKWARD]
        ledger[0, 1, ways, HOST] = interleave * stage_cost.CALLS_OF_A_HOP * timings.host_s_per_launch
        if interleave == 1:
            ledger[0, 1, ways, PP] = seconds
        else:
            ledger[0, 1, ways, SLOWDOWN] = interleave * seconds * timings.overlap_slowdown
    return ledger


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
    schedule = plan.schedule if interleave == 1 else "interleaved"
    in_flight = under_way(schedule, stage, plan.pp, plan.micro, interleave) / interleave
    return beside + replace(held, activations=held.activations * in_flight)
