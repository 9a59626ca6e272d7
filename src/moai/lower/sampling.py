"""What a step costs under a plan, read off the program that it is lowered to.

In: the graph of a step and a plan. Out: an `Observation`: the device's work and memory for the step with few layers and
with one more. Of a deep model no more than those few layers are lowered. Of stages: see `stage_sampling`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np

from moai.graph.placement import Placement
from moai.graph.step_graph import StepGraph, flat_ids
from moai.lower.cleanup import uses
from moai.lower.depth.steps import Identical, with_units
from moai.lower.holding import Known, held
from moai.lower.inputs import global_batch
from moai.lower.lowering import Lowered, Spelled, fitted, lowered, spelled
from moai.lower.operators import is_view
from moai.lower.peak import peak_bytes
from moai.lower.program import Program
from moai.lower.stage_sampling import observed_stages
from moai.lower.stages.cut import layers_of
from moai.lower.tasks import shapes_of, tasks, tasks_at
from moai.lower.unhindered import without_collections
from moai.plan.plan import Plan, Precision, Recompute
from moai.plan.work import Held, Observation, Stages, Task, Work

# Units of depth that are lowered, and one more: the first and the last are special, and so may be the one beside them,
# where messages go over from one to the other. Of large ones, they do not, unless they are gathered ahead of time.
_UNITS, _LARGE_UNITS = 3, 2
_LARGE_BYTES = 100 << 20  # of a layer's weights and states: no message holds the gradients of two such layers
# Where messages hold several layers' gradients, what is held with few layers does not tell about all. As long as there
# are no more layers than these, and these are small ones, it takes little to look at all of them.
_MOST_UNITS = 48
# More gradients than so many layers have are not those of one layer and its neighbours' ends.
_A_LAYER = 1.5
_SUMS = ("all_reduce_start", "reduce_scatter_start")


def layers(graph: StepGraph) -> int:
    """About how many layers the forward has, for the most stages: 0 where it does not repeat."""
    forward = [node for node in graph.nodes if node.origin.phase == "forward"]
    steps = [(id(node.op), *(graph.types[o] for o in flat_ids(node.outs))) for node in forward]
    found = layers_of(steps, [0] * len(steps))
    return 0 if found is None else found.count


@lru_cache(maxsize=9)
def _spelled(
    identical: Identical, precision: Precision | None, recompute: Recompute, splits_samples: bool, staged: bool
) -> Spelled:
    """Kept for the next plan: of three depths, three levels."""
    return spelled(identical.graph, precision, recompute, splits_samples, staged)


@without_collections()
def observe(
    graph: StepGraph, plan: Plan, given: Sequence[Placement | None] | None = None, fused: bool = False
) -> Observation | Stages:
    """`given`: as for `lower`; nothing is on the devices, by default. `fused`: whether regions are compiled.

    Raises PlanError and RuntimeError as `lower` does.
    """
    given = [None] * len(graph.inputs) if given is None else given
    plan = fitted(graph, plan, given)
    samples = global_batch(graph, given) / (plan.dp * plan.micro)
    if plan.pp > 1:
        return observed_stages(graph, plan, given, _lowered, samples, fused)
    units = _units(graph, plan, given)
    few, more = (with_units(graph, given, n) for n in (units, units + 1))
    if few is None or more is None:
        whole = _known(graph, plan, given)
        work, all_held = _work(whole, samples, fused), held(whole)
        return Observation(work, work, all_held, all_held, _handed(whole), 0, 0)
    here, there = (_known(each.graph, plan, each.given) for each in (few, more))
    less, greater = (_work(known, samples, fused) for known in (here, there))
    held_less, held_more = held(here), held(there)
    if units + few.deeper <= _MOST_UNITS and _joins_layers(here.program, there.program):
        held_more = _towards(held_less, held(_known(graph, plan, given)), few.deeper)
    return Observation(less, greater, held_less, held_more, _handed(here), units, few.deeper)


def _units(graph: StepGraph, plan: Plan, given: Sequence[Placement | None]) -> int:
    few = with_units(graph, given, _UNITS)
    if few is None or plan.distribute_low_prec_param:
        return _UNITS
    nbytes = (_bytes_of(Identical(graph)) - _bytes_of(Identical(few.graph))) / few.deeper
    return _LARGE_UNITS if nbytes / plan.tp > _LARGE_BYTES else _UNITS


@lru_cache(maxsize=4)
def _bytes_of(identical: Identical) -> int:
    graph = identical.graph
    return sum(graph.types[i.id].nbytes for i in graph.inputs if not i.batch)


@dataclass(frozen=True, slots=True)
class FewLayers:
    """A step with few layers, to be run. `at`: for each instruction, the position in `tasks` of the one that its time
    is a part of, if there is one."""

    program: Program
    tasks: Sequence[Task]
    at: Sequence[int | None]


def few_layers(graph: StepGraph, plan: Plan) -> FewLayers:
    """The program whose costs stand for the step's, or the step's own if it has no layers to spare.

    Raises PlanError and RuntimeError as `lower` does.
    """
    given: list[Placement | None] = [None] * len(graph.inputs)
    plan = fitted(graph, plan, given)
    few = with_units(graph, given, _UNITS)
    known = _known(graph, plan, given) if few is None else _known(few.graph, plan, few.given)
    program = replace(known.program, peak_bytes=peak_bytes(known.program, known.types))
    return FewLayers(program, *tasks_at(program, known.types, known.phases))


def _lowered(graph: StepGraph, plan: Plan, given: Sequence[Placement | None]) -> Lowered:
    begun = _spelled(Identical(graph), plan.precision, plan.recompute, plan.splits_samples, plan.pp > 1)
    return lowered(graph, plan, given, begun)


def _known(graph: StepGraph, plan: Plan, given: Sequence[Placement | None]) -> Known:
    return Known.of(graph, _lowered(graph, plan, given))


def _work(known: Known, samples: float, fused: bool) -> Work:
    return Work.of(tasks(known.program, known.types, known.phases, fused), samples=samples)


def _joins_layers(less: Program, more: Program) -> bool:
    """Whether messages hold the gradients of several layers. `more` has one layer more."""
    here, there = (_lengths_of_sums(program) for program in (less, more))
    return max(there, default=0) > _A_LAYER * (sum(there) - sum(here))


def _lengths_of_sums(program: Program) -> list[int]:
    """How many gradients each message has."""
    starts = [i for i in program.instructions if i.op in _SUMS and i.args[1] != ("tp",)]
    return [len(i.args[0]) for i in starts]


def _towards(few: Held, all_: Held, deeper: int) -> Held:
    """What one layer more than `few` holds, so that `deeper` of them hold what `all_` do."""
    pairs = [(getattr(few, f.name), getattr(all_, f.name)) for f in fields(Held)]
    return Held(*(here + (there - here) / deeper for here, there in pairs))


def _handed(known: Known) -> float:
    """Bytes that a layer gives to the next: the fewest that go on within the forward at any place in its middle."""
    code = known.program.instructions[: known.begins[0]]
    lengths = shapes_of(known.program)
    last = {i: at for at, each in enumerate(code) for i in uses(each)}
    change = [0] * (len(code) + 1)
    for at, each in enumerate(code):
        for out in flat_ids(each.outs):
            if last.get(out, at) > at and out in known.types and not is_view(each.op):
                nbytes = math.prod(lengths[out]) * known.types[out].dtype.itemsize
                change[at] += nbytes
                change[last[out]] -= nbytes
    going = np.cumsum(change)[len(code) // 4 : 3 * len(code) // 4]
    return float(going.min()) if len(going) else 0.0
