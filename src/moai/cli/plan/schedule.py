"""When each stage does what in a step, and how much memory its devices hold meanwhile.

In: a prediction and its plan. Out: spans of time, and a curve. Stages work in the order in which they will.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal

from moai.plan.plan import Plan, Schedule
from moai.plan.prediction import Parts, Prediction
from moai.plan.schedule import WEIGHTS, Turn, played
from moai.plan.stage_cost import seconds_of_parts


@dataclass(frozen=True, slots=True)
class Span:
    """From `begin` to `end` (seconds) a stage does `kind`: "forward", "backward", "recompute", "message" or
    "optimizer". `micro`: of which micro-batch, by number from 0."""

    kind: str
    begin: float
    end: float
    micro: int | None = None


@dataclass(frozen=True, slots=True)
class Lane:
    """What the devices of a stage (`stage`), or of several, do, in order: between spans they wait. `passes`: their work
    on micro-batches."""

    stage: int
    spans: tuple[Span, ...]
    passes: tuple[Pass, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """The forward of a micro-batch on a stage of the device, or its backward ("weights": the part of it that no other
    stage waits for). With the `last` one of them, what the micro-batch has left is let go of."""

    kind: Literal["forward", "backward", "weights"]
    micro: int
    begin: float
    end: float
    last: bool


def lanes(prediction: Prediction, plan: Plan) -> list[Lane]:
    """Every device's lane, where those that share stages are one."""
    chunks = plan.n_stages // plan.pp
    stages = [prediction.stages[device :: plan.pp] for device in range(plan.pp)]
    seconds = [seconds_of_parts(own, plan.schedule) for own in stages]
    found = []
    for device, turns in enumerate(played(plan.schedule, plan.micro, seconds, prediction.hop_s, chunks)):
        passes = [_pass(turn, plan.schedule, chunks) for turn in turns]
        spans = [span for each in passes for span in _pieces(each, prediction.parts)]
        once = sum(stage.once_s for stage in stages[device])
        found.append(Lane(device, (*spans, *_last(once, passes[-1].end, prediction.parts)), tuple(passes)))
    return found


def _pass(turn: Turn, schedule: Schedule, chunks: int) -> Pass:
    if turn.part < chunks:
        return Pass("forward", turn.step, turn.begin, turn.end, last=False)
    if schedule != "zero_bubble":
        return Pass("backward", turn.step, turn.begin, turn.end, last=True)
    last = turn.part == WEIGHTS
    return Pass("weights" if last else "backward", turn.step, turn.begin, turn.end, last)


def _pieces(its: Pass, parts: Parts) -> Iterator[Span]:
    """A pass, cut as the whole step is: what is computed again comes before the backward, messages behind both."""
    if its.kind == "forward":
        kinds = {"forward": parts.forward, "message": _share(parts, parts.forward)}
    else:
        messages = _share(parts, parts.backward + parts.recompute)
        kinds = {"recompute": parts.recompute, "backward": parts.backward, "message": messages}
    yield from _cut(kinds, its.begin, its.end, its.micro)


def _share(parts: Parts, computing: float) -> float:
    """Of what is waited for between forward and backward, the part that goes with `computing`."""
    all_computing = parts.forward + parts.backward + parts.recompute
    return parts.tp_exposed * computing / all_computing if all_computing else 0.0


def _last(seconds: float, begin: float, parts: Parts) -> Iterator[Span]:
    kinds = {"message": parts.dp_exposed, "optimizer": parts.optimizer}
    return _cut(kinds, begin, begin + seconds)


def _cut(kinds: dict[str, float], begin: float, end: float, micro: int | None = None) -> Iterator[Span]:
    total = sum(kinds.values())
    for kind, value in kinds.items():
        if value > 0 and end > begin:
            until = begin + (end - begin) * value / total
            total -= value
            yield Span(kind, begin, until, micro)
            begin = until


def held(prediction: Prediction, lane: Lane) -> list[tuple[float, float]]:
    """(seconds, bytes) on a device of the lane's stage, as a line whose highest point is the predicted peak. What a
    forward pass keeps grows as it goes on, and shrinks with its backward; gradients come with the first backward, and
    go with the step."""
    memory = prediction.stages[lane.stage].memory
    rest = memory.parameters + memory.states + memory.buffers
    changes = [1 if each.kind == "forward" else -1 if each.last else 0 for each in lane.passes]
    levels = list(accumulate(changes))  # micro-batches under way
    kept = memory.activations / max(levels)
    level = gradients = 0.0
    curve = [(0.0, rest)]
    for each, change in zip(lane.passes, changes, strict=True):
        if each.kind != "forward":
            gradients = memory.gradients
        curve.append((each.begin, rest + level + gradients))
        level += change * kept
        curve.append((each.end, rest + level + gradients))
    return [*curve, (lane.spans[-1].end, curve[-1][1])]
