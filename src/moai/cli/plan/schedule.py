"""When each stage does what in a step, and how much memory its devices hold meanwhile.

In: a prediction and its plan. Out: spans of time, and a curve. The order is that of 1F1B (Narayanan et al., SC21): a
stage begins as many micro-batches as there are stages behind it, and then alternates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from moai.plan.cost import Parts, Prediction, Stage
from moai.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Span:
    """From `begin` to `end` (seconds) a stage does `kind`: "forward", "backward", "recompute", "message" or
    "optimizer"."""

    kind: str
    begin: float
    end: float


@dataclass(frozen=True, slots=True)
class Lane:
    """What the devices of one stage do, in order: between spans they wait. `passes`: (forward, begin, end) of its work
    on each micro-batch."""

    stage: int
    spans: tuple[Span, ...]
    passes: tuple[tuple[bool, float, float], ...]


def lanes(prediction: Prediction, plan: Plan) -> list[Lane]:
    """Every stage's lane."""
    stages, parts = prediction.stages, prediction.parts
    blocks = _blocks(stages, plan.micro)
    ends = [block[-1][2] for block in blocks]
    found = []
    for s, stage in enumerate(stages):
        spans = [span for forward, begin, end in blocks[s] for span in _pieces(forward, begin, end, parts)]
        found.append(Lane(s, (*spans, *_last(stage, ends[s], parts)), tuple(blocks[s])))
    return found


def _blocks(stages: Sequence[Stage], micro: int) -> list[list[tuple[bool, float, float]]]:
    """(forward, begin, end) of each stage's work on each micro-batch, in its order."""
    orders = [list(_order(len(stages) - s, micro)) for s in range(len(stages))]
    done: dict[tuple[int, bool, int], float] = {}
    blocks: list[list[tuple[bool, float, float]]] = [[] for _ in stages]
    while any(len(block) < len(order) for block, order in zip(blocks, orders, strict=True)):
        for s, stage in enumerate(stages):
            while len(blocks[s]) < len(orders[s]):
                forward, batch = orders[s][len(blocks[s])]
                needed = _needed(s, forward, batch, len(stages))
                if needed is not None and needed not in done:
                    break
                ready = 0.0 if needed is None else done[needed]
                begin = max(ready, blocks[s][-1][2] if blocks[s] else 0.0)
                end = begin + (stage.forward_s if forward else stage.backward_s)
                blocks[s].append((forward, begin, end))
                done[s, forward, batch] = end
    return blocks


def _order(behind: int, micro: int) -> Iterator[tuple[bool, int]]:
    """(forward, micro-batch) of a stage with `behind` stages from itself to the last."""
    early = min(behind, micro)
    yield from ((True, batch) for batch in range(early))
    for batch in range(micro):
        yield False, batch
        if batch + early < micro:
            yield True, batch + early


def _needed(stage: int, forward: bool, batch: int, n_stages: int) -> tuple[int, bool, int] | None:
    if forward:
        return (stage - 1, True, batch) if stage else None
    return (stage + 1, False, batch) if stage + 1 < n_stages else (stage, True, batch)


def _pieces(forward: bool, begin: float, end: float, parts: Parts) -> Iterator[Span]:
    """A block, cut as the whole step is: what is computed again comes before the backward, messages behind both."""
    if forward:
        kinds = {"forward": parts.forward, "message": _share(parts, parts.forward)}
    else:
        messages = _share(parts, parts.backward + parts.recompute)
        kinds = {"recompute": parts.recompute, "backward": parts.backward, "message": messages}
    yield from _cut(kinds, begin, end)


def _share(parts: Parts, computing: float) -> float:
    """Of what is waited for between forward and backward, the part that goes with `computing`."""
    all_computing = parts.forward + parts.backward + parts.recompute
    return (parts.tp_exposed + parts.pp_exposed) * computing / all_computing if all_computing else 0.0


def _last(stage: Stage, begin: float, parts: Parts) -> Iterator[Span]:
    kinds = {"message": parts.dp_exposed, "optimizer": parts.optimizer}
    return _cut(kinds, begin, begin + stage.once_s)


def _cut(kinds: dict[str, float], begin: float, end: float) -> Iterator[Span]:
    total = sum(kinds.values())
    for kind, value in kinds.items():
        if value > 0 and end > begin:
            until = begin + (end - begin) * value / total
            total -= value
            yield Span(kind, begin, until)
            begin = until


def held(prediction: Prediction, lane: Lane, plan: Plan) -> list[tuple[float, float]]:
    """(seconds, bytes) on a device of the lane's stage, as a line whose highest point is the predicted peak. What a
    forward pass keeps grows as it goes on, and shrinks with its backward; gradients come with the first backward, and
    go with the step."""
    memory = prediction.stages[lane.stage].memory
    rest = memory.parameters + memory.states + memory.buffers
    each = memory.activations / min(plan.micro, len(prediction.stages) - lane.stage)
    level = gradients = 0.0
    curve = [(0.0, rest)]
    for forward, begin, end in lane.passes:
        if not forward:
            gradients = memory.gradients
        curve.append((begin, rest + level + gradients))
        level += each if forward else -each
        curve.append((end, rest + level + gradients))
    return [*curve, (lane.spans[-1].end, curve[-1][1])]
