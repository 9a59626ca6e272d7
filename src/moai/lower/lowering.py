"""StepGraph + Plan -> Program.

In: the graph of a step, the plan for it, and how its inputs already lie on the devices. Out: the Program that every
device runs. The result is that of one device on the global batch: no operator sees a part where it needs the whole.

Of a deep model a few layers are lowered, which the others repeat (`depth`).
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from moai.graph.placement import TIME, Mesh, Placement
from moai.graph.step_graph import Node, Origin, StepGraph, TensorType, flat_ids, has_backward, refs
from moai.lower.batches import with_batch_dims
from moai.lower.canonical import canonical
from moai.lower.check import check
from moai.lower.cleanup import without_dead, without_repetitions
from moai.lower.depth.steps import Deep, Shallow, deepened, shallow
from moai.lower.dropped import with_own_views
from moai.lower.experts import without_sorts
from moai.lower.finishing import finished
from moai.lower.inputs import Arrival, arrivals, batch_sizes, global_batch
from moai.lower.loops import in_loops
from moai.lower.moving import without_time
from moai.lower.peak import peak_bytes
from moai.lower.placing import Placer
from moai.lower.precision import in_precision
from moai.lower.program import Instruction, Program, Slot
from moai.lower.recompute import recomputed
from moai.lower.stages.arrivals import numbered
from moai.lower.stages.assign import NoCut
from moai.lower.stages.pipeline import in_stages
from moai.lower.tensor_parallel import TensorParallel, tensor_parallel
from moai.lower.unhindered import without_collections
from moai.lower.validate import validate
from moai.lower.values import Values
from moai.lower.wishes import wishes
from moai.plan.errors import PlanError
from moai.plan.nearest import nearest
from moai.plan.plan import Plan, Precision, Recompute

# Set to 1, every program is validated when it is made.
VALIDATE = "MOAI_VALIDATE"

_names = (f"step{i}" for i in itertools.count())


def new_name() -> str:
    """A name that no other program of this process has."""
    return next(_names)


@without_collections()
def lower(graph: StepGraph, plan: Plan, given: Sequence[Placement | None]) -> Program:
    """The program that runs `graph` on `plan.n_devices` devices.

    `given[i]` is the placement that input i has on the devices, or None where it is still on the host:
    `Program.inputs[i].placement` then says how it is to be uploaded.

    Raises PlanError where the graph cannot be run so, and RuntimeError for operators that cannot give one device's
    result on several devices.
    """
    plan = fitted(graph, plan, given)
    few_layers = shallow(graph, given, plan) if plan.pp == 1 else ()
    tried = (_of_few_layers(graph, few, plan) for few in few_layers)
    deep = next((deep for deep in tried if deep is not None), None)
    if deep is not None:
        program = deep.program
    else:
        whole = lowered(graph, plan, given)
        types = whole.types
        program = _with_peak(whole.program, types)
    if os.environ.get(VALIDATE) == "1":
        check(program)
        validate(program, types if deep is None else deep.types())
    return program


def _with_peak(program: Program, types: Mapping[int, TensorType]) -> Program:
    """`program` with what its devices hold at most."""
    if not program.stages:
        return replace(program, peak_bytes=peak_bytes(program, types))
    stages = tuple(_with_peak(stage, types) for stage in program.stages)
    return replace(program, stages=stages, peak_bytes=max(stage.peak_bytes for stage in stages))


def _of_few_layers(graph: StepGraph, few: Shallow, plan: Plan) -> Deep | None:
    """What `graph` is lowered to, from the same step with few layers, if it is clear what that would be."""
    whole = lowered(few.graph, plan, few.given)
    deep = deepened(whole.program, whole.types, few)
    if deep is None:
        return None
    inputs = [s.type for s in deep.program.inputs] == [graph.types[i.id] for i in graph.inputs]
    found = [(s.type, s.replaces) for s in deep.program.outputs]
    return deep if inputs and found == [(graph.types[o.id], o.replaces) for o in graph.outputs] else None


@dataclass(frozen=True)
class Lowered:
    """A program, but for its peak, with the types of its values, and the nodes that it was written from. Values in
    `twice` are made a second time, for the backward. `layers`: how many of them each stage has, where that is known."""

    program: Program
    types: Mapping[int, TensorType]
    nodes: Sequence[Node]
    twice: range
    layers: tuple[int, ...] | None = None

    @property
    def phases(self) -> dict[int, str]:
        """In which phase of the step a node makes a value: one of Phase, or "recomputed"."""
        return {
            out: "recomputed" if out in self.twice else node.origin.phase
            for node in self.nodes
            for out in flat_ids(node.outs)
        }


@dataclass(frozen=True)
class Spelled:
    """The nodes of a graph as they are lowered, for any number of devices: in one spelling, in a plan's precision, and
    with what is computed again. Values from `once` on are made a second time."""

    nodes: Sequence[Node]
    types: Sequence[TensorType]
    outputs: Sequence[int]
    once: int


def spelled(
    graph: StepGraph, precision: Precision | None, recompute: Recompute, splits_samples: bool, staged: bool
) -> Spelled:
    """What lowering begins with. `splits_samples`: whether devices or micro-batches share the batch. `staged`: whether
    there are stages."""
    nodes, types, outputs = canonical(graph)
    if splits_samples:
        nodes, types, outputs = without_sorts(nodes, types, outputs)
    nodes, types = in_precision(nodes, types, graph.inputs, outputs, precision)
    once = len(types)
    nodes, types = recomputed(nodes, types, graph.inputs, outputs, recompute, None, staged)
    return Spelled(nodes, types, outputs, once)


def lowered(graph: StepGraph, plan: Plan, given: Sequence[Placement | None], begun: Spelled | None = None) -> Lowered:
    """All nodes of `graph`, one by one. `plan` is `fitted`; `begun`: its `spelled`, if that is at hand."""
    mesh = plan.mesh
    begun = begun or spelled(graph, plan.precision, plan.recompute, plan.splits_samples, plan.pp > 1)
    nodes, types, outputs, once = list(begun.nodes), list(begun.types), begun.outputs, begun.once
    if plan.distribute_low_prec_param:
        nodes, types = with_own_views(nodes, types, graph.inputs)
    twice = range(once, len(types))
    values = Values(types, mesh)
    lies = [None if p is None else replace(p, stages=()) for p in given]
    if plan.tp > 1:
        nodes = with_batch_dims(nodes, values, outputs)
    split = tensor_parallel(nodes, values, graph, plan)
    arriving = arrivals(graph, plan, mesh, lies, split.inputs)
    placer = _placer(graph, plan, values, split, arriving)
    for node in split.nodes:
        placer.add(node)
    outputs = _placed_outputs(graph, outputs, placer, values, arriving)

    code = without_dead(placer.emission.code, outputs)
    code, renamed = without_repetitions(code, values)
    outputs = [renamed.get(o, o) for o in outputs]
    code = in_loops(code, outputs, placer.emission.remade, values)
    donated = _donated(graph)
    if plan.pp == 1:
        return Lowered(_whole(graph, code, outputs, donated, placer, values), values.types, split.nodes, twice)
    program, layers = _staged(graph, plan, given, code, outputs, donated, placer, values)
    return Lowered(program, values.types, split.nodes, twice, layers)


def _whole(
    graph: StepGraph,
    code: Sequence[Instruction],
    outputs: Sequence[int],
    donated: Collection[int],
    placer: Placer,
    values: Values,
) -> Program:
    """The program that all devices run."""
    inputs = [Slot(i.id, values.types[i.id], values.placement(i.id), k in donated) for k, i in enumerate(graph.inputs)]
    replaced = [out.replaces for out in graph.outputs]
    return _finished(graph, code, inputs, list(zip(outputs, replaced, strict=True)), (), placer, values)


def _finished(
    graph: StepGraph,
    code: Sequence[Instruction],
    inputs: Sequence[Slot],
    outputs: Sequence[tuple[int, int | None]],
    stages: tuple[int, ...],
    placer: Placer,
    values: Values,
) -> Program:
    """`outputs`: values, and the inputs that they replace. `stages`: where they are."""
    states = [id_ for id_, replaces in outputs if replaces is not None]
    borrowed = [s.id for s in inputs if not s.donated]
    done, names = finished(code, [id_ for id_, _ in outputs], states, borrowed, placer.emission.stored, values)
    found = Program(
        name=new_name(),
        mesh=values.mesh,
        inputs=tuple(inputs),
        outputs=tuple(
            Slot(id_, values.types[id_], replace(values.placement(id_), stages=stages), replaces=replaces)
            for id_, (_, replaces) in zip(names, outputs, strict=True)
        ),
        n_scalars=graph.n_scalars,
        instructions=tuple(done),
        peak_bytes=0,
        resident_bytes=sum(values.local_bytes(s.id) for s in inputs),
        notes=tuple(placer.notes),
    )
    check(found)
    return found


def _staged(
    graph: StepGraph,
    plan: Plan,
    given: Sequence[Placement | None],
    code: Sequence[Instruction],
    outputs: Sequence[int],
    donated: Collection[int],
    placer: Placer,
    values: Values,
) -> tuple[Program, tuple[int, ...] | None]:
    """A program for each stage, and how many layers each has."""
    sizes = batch_sizes(graph)
    if len(sizes) > 1 and has_backward(graph):
        reason = (
            f"pp={plan.pp}: the step's data are of various batch sizes ({', '.join(map(str, sizes))}), so that it is "
            "not clear what a micro-batch is."
        )
        raise PlanError(reason, nearest(replace(plan, layers=None), plan.n_devices, lambda other: other.pp == 1))
    try:
        pipeline = in_stages(graph, plan, given, code, outputs, placer.emission.phases(), values)
    except NoCut as error:
        chunks = f",chunks={plan.chunks}" if plan.n_stages > plan.pp else ""
        most = error.most
        possible = nearest(replace(plan, layers=None), plan.n_devices, lambda other: other.n_stages <= most)
        raise PlanError(f"pp={plan.pp}{chunks}: {error}.", possible) from None
    inputs = [
        Slot(i.id, values.types[i.id], replace(values.placement(i.id), stages=stages), k in donated)
        for k, (i, stages) in enumerate(zip(graph.inputs, pipeline.inputs, strict=True))
    ]
    made = [(id_, out.replaces) for id_, out in zip(outputs, graph.outputs, strict=True)]
    stages = []
    for stage, own in enumerate(pipeline.code):
        given_here = [s for s in inputs if s.placement.on(stage)]
        made_here = [out for out, (home,) in zip(made, pipeline.outputs, strict=True) if home == stage]
        stages.append(_finished(graph, own, given_here, made_here, (stage,), placer, values))
    stages = numbered(stages)
    slots = [iter(stage.outputs) for stage in stages]
    program = Program(
        name=new_name(),
        mesh=values.mesh,
        inputs=tuple(inputs),
        outputs=tuple(next(slots[home]) for (home,) in pipeline.outputs),
        n_scalars=graph.n_scalars,
        instructions=(),
        peak_bytes=0,
        resident_bytes=max(stage.resident_bytes for stage in stages),
        notes=tuple(placer.notes),
        stages=tuple(stages),
    )
    return program, pipeline.layers


def fitted(graph: StepGraph, plan: Plan, given: Sequence[Placement | None]) -> Plan:
    """The plan for this graph: micro-batches need a backward, and a sample each.

    A first step that is too small is refused. Later ones, like the last batch of an epoch, run in fewer parts.
    """
    if plan.micro == 1:
        return plan
    if all(n.origin.phase != "backward" for n in graph.nodes):
        return replace(plan, micro=1)
    batch = global_batch(graph, given)
    most = max(batch // plan.dp, 1)
    if most >= plan.micro:
        return plan
    if all(p is None for p in given):
        reason = f"a batch of {batch} cannot be cut into dp={plan.dp} x micro={plan.micro} parts of a sample or more."
        raise PlanError(reason, replace(plan, micro=most) if batch >= plan.dp else None)
    return replace(plan, micro=most)


def _placer(graph: StepGraph, plan: Plan, values: Values, split: TensorParallel, arriving: Sequence[Arrival]) -> Placer:
    """The placer, with the inputs in their places."""
    states = {
        i.id: a.wanted.shards for i, a in zip(graph.inputs, arriving, strict=True) if not i.batch and a.wanted.shards
    }
    stored = {i.id for i, a in zip(graph.inputs, arriving, strict=True) if a.stored}
    sums = dict(split.sums)
    if stored:
        sums |= wishes(split.nodes, values.types, states)
    uses = Counter(r.id for n in split.nodes for r in refs((n.args, n.kwargs)))
    trained = [graph.inputs[out.replaces].id for out in graph.outputs if out.replaces is not None]
    placer = Placer(values, plan, stored, sums, split.gradients, uses, trained)
    for input_, arrival in zip(graph.inputs, arriving, strict=True):
        values.place(input_.id, arrival.present)
    for input_, arrival in zip(graph.inputs, arriving, strict=True):
        placer.begin(input_.id, arrival.wanted)
    return placer


def _donated(graph: StepGraph) -> set[int]:
    """Inputs whose buffers the program may overwrite: nobody needs their content after the step."""
    replaced = {o.replaces for o in graph.outputs}
    return {k for k, i in enumerate(graph.inputs) if i.dies or k in replaced}


def _placed_outputs(
    graph: StepGraph, outputs: Sequence[int], placer: Placer, values: Values, arriving: Sequence[Arrival]
) -> list[int]:
    """The values to put out. What takes the place of a state lies as the next step expects it to.

    A single number is summed, since scripts read those (losses, counts, norms). Any other sum may stay in terms:
    gradients, to which the next segment adds its own. Samples stay split over devices; nothing stays in micro-batches.
    """
    origin = graph.nodes[-1].origin if graph.nodes else Origin("forward")
    found = []
    for id_, out in zip(outputs, graph.outputs, strict=True):
        id_ = placer.settled(id_)
        taken_over = None if out.replaces is None else arriving[out.replaces]
        if values.types[id_].numel == 1:
            wanted = Placement()
        elif taken_over is not None and not graph.inputs[out.replaces or 0].batch and not taken_over.wanted.partial:
            wanted = taken_over.wanted
        else:
            wanted = _out_of_time(values.placement(id_), values.mesh)
        found.append(placer.emission.placed(id_, wanted, origin))
    return found


def _out_of_time(placement: Placement, mesh: Mesh) -> Placement:
    """`placement` with micro-batches joined and added up."""
    shards = (without_time(s, mesh) for s in placement.shards)
    return Placement(tuple(s for s in shards if s is not None), tuple(a for a in placement.partial if a != TIME))
