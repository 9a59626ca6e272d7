"""How much memory a device holds in the course of a step.

In: a step's graph, a plan without stages, and how long tasks take. Out: a curve. All layers are lowered for it.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from moai.graph.placement import Placement
from moai.graph.step_graph import StepGraph
from moai.lower.holding import Known
from moai.lower.lowering import fitted, lowered
from moai.lower.peak import levels
from moai.lower.program import Program
from moai.lower.tasks import tasks_at
from moai.lower.unhindered import without_collections
from moai.plan.plan import Plan
from moai.plan.work import KINDS, MESSAGES, Work


@without_collections()
def course(
    graph: StepGraph, plan: Plan, seconds: Callable[[Work], np.ndarray], points: int = 400
) -> list[tuple[float, float]]:
    """(part of the step's time, bytes) at so many places, each with the most that is held until the next one. What is
    sent in the background takes no time of its own."""
    given: list[Placement | None] = [None] * len(graph.inputs)
    known = Known.of(graph, lowered(graph, fitted(graph, plan, given), given))
    own = _seconds(known, seconds)
    by_place = levels(known.program, known.types)
    held = [[level.total + known.coming[at] for level in each] for at, each in enumerate(by_place)]
    first, later = (np.array([each[k] for each in held[:-1]], dtype=np.float64) for k in (0, -1))
    begin, end, passes = _loop(known.program)
    body = slice(begin, end)
    bytes_ = np.concatenate([first[:end], np.tile(later[body], passes - 1), first[end:]])
    taken = np.concatenate([own[:end], np.tile(own[body], passes - 1), own[end:]])
    return _sampled(np.cumsum(taken) - taken, bytes_, points)


def _seconds(known: Known, seconds: Callable[[Work], np.ndarray]) -> np.ndarray:
    """Of each instruction: the first one of a task takes all of its time."""
    tasks, at = tasks_at(known.program, known.types, known.phases)
    work = Work.of(tasks)
    beside = (work.kind >= KINDS.index(MESSAGES[0])) & (work.until > 1)
    of_tasks = np.where(beside, 0.0, seconds(work))
    found = np.zeros(len(at))
    seen: set[int] = set()
    for index, task in enumerate(at):
        if task is not None and task not in seen:
            seen.add(task)
            found[index] = of_tasks[task]
    return found


def _loop(program: Program) -> tuple[int, int, int]:
    """Where the longest loop begins and ends, and its passes. Others are over at once."""
    ops = [each.op for each in program.instructions]
    begins, ends = ([at for at, op in enumerate(ops) if op == name] for name in ("repeat", "end_repeat"))
    longest = max(zip(begins, ends, strict=True), key=lambda each: each[1] - each[0], default=(0, 0))
    return longest[0] + 1 if begins else 0, longest[1], program.mesh.steps if begins else 1


def _sampled(at: np.ndarray, bytes_: np.ndarray, points: int) -> list[tuple[float, float]]:
    """The most in each of so many equal parts of the time; where nothing begins, it is as before."""
    place = np.minimum((at / max(at[-1], 1e-30) * points).astype(np.int64), points - 1)
    most = np.zeros(points)
    np.maximum.at(most, place, bytes_)
    for k in range(1, points):
        most[k] = most[k] or most[k - 1]
    return [(k / points, float(level)) for k, level in enumerate(most)]
