"""StepGraph + Plan -> Program.

In: the graph of a step, the plan for it, and how its inputs already lie on the devices. Out: the Program that every
device runs. The result is that of one device on the global batch: no operator sees a part where it needs the whole.

Of a deep model a few layers are lowered, which the others repeat (`depth`).
"""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moai.graph.placement import TIME, Mesh, Placement
from moai.graph.step_graph import Node, Origin, Ref, StepGraph, TensorType, flat_ids, refs
from moai.lower.batches import with_batch_dims
from moai.lower.buckets import bucketed
from moai.lower.canonical import canonical
from moai.lower.check import check
from moai.lower.cleanup import uses, without_dead, without_repetitions
from moai.lower.depth.steps import Deep, Shallow, deepened, shallow
from moai.lower.dropped import with_own_views
from moai.lower.experts import without_sorts
from moai.lower.inplace import in_place
from moai.lower.inputs import Arrival, arrivals, global_batch
from moai.lower.loops import in_loops
from moai.lower.memory import SharedMemory, with_frees
from moai.lower.moving import without_time
from moai.lower.operators import is_view, overlaps_itself
from moai.lower.peak import peak_bytes
from moai.lower.placing import Placer
from moai.lower.precision import in_precision
from moai.lower.program import Instruction, Program, Slot
from moai.lower.recompute import recomputed
from moai.lower.regions import gathered
from moai.lower.small_sums import under_way
from moai.lower.tensor_parallel import TensorParallel, tensor_parallel
from moai.lower.unhindered import without_collections
from moai.lower.validate import validate
from moai.lower.values import Values
from moai.lower.wishes import wishes
from moai.plan.errors import PlanError
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
    tried = (_of_few_layers(graph, few, plan) for few in shallow(graph, given, plan))
    deep = next((deep for deep in tried if deep is not None), None)
    if deep is not None:
        program = deep.program
    else:
        whole = lowered(graph, plan, given)
        types = whole.types
        program = replace(whole.program, peak_bytes=peak_bytes(whole.program, types))
    if os.environ.get(VALIDATE) == "1":
        check(program)
        validate(program, types if deep is None else deep.types())
    return program


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
    `twice` are made a second time, for the backward."""

    program: Program
    types: Mapping[int, TensorType]
    nodes: Sequence[Node]
    twice: range

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


def spelled(graph: StepGraph, precision: Precision | None, recompute: Recompute, splits_samples: bool) -> Spelled:
    """What lowering begins with. `splits_samples`: whether devices or micro-batches share the batch."""
    nodes, types, outputs = canonical(graph)
    if splits_samples:
        nodes, types, outputs = without_sorts(nodes, types, outputs)
    nodes, types = in_precision(nodes, types, graph.inputs, outputs, precision)
    once = len(types)
    nodes, types = recomputed(nodes, types, graph.inputs, outputs, recompute, None)
    return Spelled(nodes, types, outputs, once)


def lowered(graph: StepGraph, plan: Plan, given: Sequence[Placement | None], begun: Spelled | None = None) -> Lowered:
    """All nodes of `graph`, one by one. `plan` is `fitted`; `begun`: its `spelled`, if that is at hand."""
    mesh = plan.mesh
    begun = begun or spelled(graph, plan.precision, plan.recompute, plan.splits_samples)
    nodes, types, outputs, once = list(begun.nodes), list(begun.types), begun.outputs, begun.once
    if plan.distribute_low_prec_param:
        nodes, types = with_own_views(nodes, types, graph.inputs)
    twice = range(once, len(types))
    values = Values(types, mesh)
    if plan.tp > 1:
        nodes = with_batch_dims(nodes, values, outputs)
    split = tensor_parallel(nodes, values, graph, plan)
    arriving = arrivals(graph, plan, mesh, given, split.inputs)
    placer = _placer(graph, plan, values, split, arriving)
    for node in split.nodes:
        placer.add(node)
    outputs = _placed_outputs(graph, outputs, placer, values, arriving)

    code = without_dead(placer.code, outputs)
    code, renamed = without_repetitions(code, values)
    outputs = [renamed.get(o, o) for o in outputs]
    code = in_loops(code, outputs, placer.remade, values)
    states = [id_ for id_, out in zip(outputs, graph.outputs, strict=True) if out.replaces is not None]
    code = under_way(code, states, values)
    code = bucketed(code, values, placer.stored)
    code = gathered(code, outputs, values)
    donated = _donated(graph)
    borrowed = [i.id for k, i in enumerate(graph.inputs) if k not in donated]
    code, renamed = in_place(code, borrowed, outputs, values)
    outputs = [renamed.get(o, o) for o in outputs]
    code, outputs = _outputs_apart(code, outputs, set(borrowed), values)
    code = with_frees(code, {*outputs, *borrowed})

    inputs = [i.id for i in graph.inputs]
    program = Program(
        name=new_name(),
        mesh=mesh,
        inputs=tuple(Slot(i, values.types[i], values.placement(i), k in donated) for k, i in enumerate(inputs)),
        outputs=tuple(
            Slot(id_, values.types[id_], values.placement(id_), replaces=out.replaces)
            for id_, out in zip(outputs, graph.outputs, strict=True)
        ),
        n_scalars=graph.n_scalars,
        instructions=tuple(code),
        peak_bytes=0,
        resident_bytes=sum(map(values.local_bytes, inputs)),
        notes=tuple(placer.notes),
    )
    check(program)
    return Lowered(program, values.types, split.nodes, twice)


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
    placer = Placer(values, plan, stored, sums, split.gradients, uses)
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
        found.append(placer.placed(id_, wanted, origin))
    return found


def _out_of_time(placement: Placement, mesh: Mesh) -> Placement:
    """`placement` with micro-batches joined and added up."""
    shards = (without_time(s, mesh) for s in placement.shards)
    return Placement(tuple(s for s in shards if s is not None), tuple(a for a in placement.partial if a != TIME))


def _outputs_apart(
    code: list[Instruction], outputs: list[int], borrowed: set[int], values: Values
) -> tuple[list[Instruction], list[int]]:
    """Give every output memory of its own: a later program may overwrite one and must not change another.

    Copied is what shares memory with an earlier output or with an input that stays, what holds several entries in
    one place, and what would keep a much larger buffer alive.
    """
    memory = SharedMemory()
    overlapping: set[int] = set()
    for instruction in code:
        memory.follow(instruction)
        inherited = is_view(instruction.op) and not overlapping.isdisjoint(uses(instruction))
        if inherited or overlaps_itself(instruction):
            overlapping.update(flat_ids(instruction.outs))
    taken = {memory.find(i) for i in borrowed}
    apart = []
    for id_ in outputs:
        whole = memory.find(id_)
        if whole in taken or id_ in overlapping or values.local_bytes(id_) < values.local_bytes(whole):
            copy = values.new(values.types[id_], values.placement(id_))
            shapes = (values.local_shape(copy),)
            code = [*code, Instruction("aten.clone.default", (Ref(id_),), {}, copy, (), shapes)]
            apart.append(copy)
        else:
            taken.add(whole)
            apart.append(id_)
    return code, apart
