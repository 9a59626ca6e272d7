"""What the stages of a pipeline cost, read off the programs that they are lowered to.

In: the graph of a step and a plan with stages. Out: `Stages`. Three stages are lowered, of which the first and the last
have one layer each, and once more with another number of layers in the middle: of a deep model, of few layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from moai.graph.placement import Placement
from moai.graph.step_graph import StepGraph
from moai.lower.depth.steps import with_units
from moai.lower.holding import Known, held
from moai.lower.lowering import Lowered
from moai.lower.stages.weights import awaited_by_none, kept_for
from moai.lower.tasks import bytes_by, shapes_of, tasks
from moai.plan.errors import PlanError
from moai.plan.plan import Plan
from moai.plan.work import Stages, StageWork, Work

# Units of depth that are lowered: a layer or so for each end, and those in the middle.
_UNITS = 3
# The first stage, the last, and one between. The 0 stands for all layers that are left.
_FIRST, _MIDDLE, _LAST = range(3)
_DEALT, _DEALT_FEWER = (1, 0, 1), (1, 0, 2)
_LEAST_LAYERS = sum(_DEALT_FEWER) + 1

Lower = Callable[[StepGraph, Plan, Sequence[Placement | None]], Lowered]


def observed_stages(
    graph: StepGraph, plan: Plan, given: Sequence[Placement | None], lower: Lower, samples: float, fused: bool
) -> Stages:
    """`plan` is fitted, for any number of stages in any order; `samples`: of a micro-batch, on a device.

    Raises PlanError and RuntimeError as `lower` does, and PlanError where it is not clear what the layers are.
    """
    plan = replace(plan, pp=len(_DEALT), layers=_DEALT, schedule="1f1b", chunks=Plan().chunks)

    def known(graph: StepGraph, given: Sequence[Placement | None], plan: Plan) -> tuple[list[StageWork], Lowered]:
        found = lower(graph, plan, given)
        assert found.layers is not None
        each = zip(Known.of_stages(graph, found), found.layers, strict=True)
        return [_stage_work(stage, n, samples, fused) for stage, n in each], found

    few, more = (with_units(graph, given, n) for n in (_UNITS, _UNITS + 1))
    if few is not None and more is not None:
        here, found = known(few.graph, few.given, plan)
        there, other = known(more.graph, more.given, plan)
        middle, deeper = here[_MIDDLE], there[_MIDDLE]
        n = _count(found) + few.deeper * (_count(other) - _count(found))
    else:
        try:
            here, found = known(graph, given, plan)
            there, _ = known(graph, given, replace(plan, layers=_DEALT_FEWER))
        except PlanError as error:
            why = error.reason.removeprefix(f"pp={plan.pp}: ").rstrip(".")  # which nobody asked for
            reason = f"stages are predicted for models of {_LEAST_LAYERS} layers or more whose cuts are clear ({why})"
            raise PlanError(reason) from None
        middle, deeper = there[_MIDDLE], here[_MIDDLE]
        n = _count(found)
    return Stages(here[_FIRST], middle, deeper, here[_LAST], n, _handed(found))


def _count(found: Lowered) -> int:
    return sum(found.layers or ())


def _stage_work(known: Known, layers: int, samples: float, fused: bool) -> StageWork:
    alone = held(known)
    work = Work.of(tasks(known.program, known.types, known.phases, fused), samples=samples)
    nbytes = bytes_by(shapes_of(known.program), known.types)
    late = awaited_by_none(known.program, nbytes)
    kept = float(kept_for(late, known.program, nbytes)) if late else 0.0
    return StageWork(work, alone, held(known, 2).total - alone.total, layers, kept)


def _handed(found: Lowered) -> float:
    """Bytes that the stage in the middle gives to the last one for a micro-batch."""
    program, inside, sent = found.program.stages[_MIDDLE], False, set()
    for each in program.instructions:
        inside = each.op == "repeat" or (inside and each.op != "end_repeat")
        if inside and each.op == "send" and each.args[1] == _LAST:
            sent |= {x.id for x in each.args[0]}
    shapes = shapes_of(program)
    return float(sum(math.prod(shapes[i]) * found.types[i].dtype.itemsize for i in sent))
