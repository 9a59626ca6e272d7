"""When each stage does what in a step, and how much memory its devices hold meanwhile.

In: a prediction and its plan. Out: spans of time, and a curve. Stages work in the order in which they will.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from moai.lower.stages.schedule import FORWARD, Order, order
from moai.plan.cost import Parts, Prediction, Stage
from moai.plan.plan import Plan


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
    """What the devices of one stage do, in order: between spans they wait. `passes`: its work on micro-batches."""

    stage: int
    spans: tuple[Span, ...]
    passes: tuple[Pass, ...]


@dataclass(frozen=True, slots=True)
class Pass:
    """The forward of a micro-batch, or its backward."""

    forward: bool
    micro: int
    begin: float
    end: float


def lanes(prediction: Prediction, plan: Plan) -> list[Lane]:
    """Every stage's lane."""
    stages, parts = prediction.stages, prediction.parts
    found = []
    for s, passes in enumerate(_passes(stages, _orders(plan))):
        spans = [span for each in passes for span in _pieces(each, parts)]
        found.append(Lane(s, (*spans, *_last(stages[s], passes[-1].end, parts)), tuple(passes)))
    return found


def _orders(plan: Plan) -> list[Order]:
    return [order(plan.schedule, stage, plan.pp, plan.micro) for stage in range(plan.pp)]


def _passes(stages: Sequence[Stage], orders: Sequence[Order]) -> list[list[Pass]]:
    """Each stage's work on micro-batches, in its order: as soon as it is done with the one before, and has what it
    needs of its neighbour."""
    done: dict[tuple[int, bool, int], float] = {}
    found: list[list[Pass]] = [[] for _ in stages]
    while any(len(passes) < len(order) for passes, order in zip(found, orders, strict=True)):
        for s, stage in enumerate(stages):
            while len(found[s]) < len(orders[s]):
                part, micro = orders[s][len(found[s])]
                forward = part == FORWARD
                needed = _needed(s, forward, micro, len(stages))
                if needed is not None and needed not in done:
                    break
                ready = 0.0 if needed is None else done[needed]
                begin = max(ready, found[s][-1].end if found[s] else 0.0)
                end = begin + (stage.forward_s if forward else stage.backward_s)
                found[s].append(Pass(forward, micro, begin, end))
                done[s, forward, micro] = end
    return found


def _needed(stage: int, forward: bool, micro: int, n_stages: int) -> tuple[int, bool, int] | None:
    if forward:
        return (stage - 1, True, micro) if stage else None
    return (stage + 1, False, micro) if stage + 1 < n_stages else (stage, True, micro)


def _pieces(its: Pass, parts: Parts) -> Iterator[Span]:
    """A pass, cut as the whole step is: what is computed again comes before the backward, messages behind both."""
    if its.forward:
        kinds = {"forward": parts.forward, "message": _share(parts, parts.forward)}
    else:
        messages = _share(parts, parts.backward + parts.recompute)
        kinds = {"recompute": parts.recompute, "backward": parts.backward, "message": messages}
    yield from _cut(kinds, its.begin, its.end, its.micro)


def _share(parts: Parts, computing: float) -> float:
    """Of what is waited for between forward and backward, the part that goes with `computing`."""
    all_computing = parts.forward + parts.backward + parts.recompute
    return (parts.tp_exposed + parts.pp_exposed) * computing / all_computing if all_computing else 0.0


def _last(stage: Stage, begin: float, parts: Parts) -> Iterator[Span]:
    kinds = {"message": parts.dp_exposed, "optimizer": parts.optimizer}
    return _cut(kinds, begin, begin + stage.once_s)


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
    levels = list(accumulate(1 if each.forward else -1 for each in lane.passes))  # micro-batches under way
    kept = memory.activations / max(levels)
    level = gradients = 0.0
    curve = [(0.0, rest)]
    for each in lane.passes:
        if not each.forward:
            gradients = memory.gradients
        curve.append((each.begin, rest + level + gradients))
        level += kept if each.forward else -kept
        curve.append((each.end, rest + level + gradients))
    return [*curve, (lane.spans[-1].end, curve[-1][1])]
