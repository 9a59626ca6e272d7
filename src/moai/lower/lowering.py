"""StepGraph + Plan -> Program.

In: the graph of a step, the plan for it, and how its inputs already lie on the devices. Out: the Program that every
device runs. The result is that of one device on the global batch: no operator sees a part where it needs the whole.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence

from moai.graph.placement import Placement, Replicate, Shard, split_evenly
from moai.graph.rules.dims import REPLICATE
from moai.graph.step_graph import Input, Origin, Ref, StepGraph, flat_ids
from moai.lower.buckets import bucketed
from moai.lower.canonical import canonical
from moai.lower.check import check
from moai.lower.cleanup import uses, without_dead, without_repetitions
from moai.lower.inplace import in_place
from moai.lower.memory import Regions, peak_bytes, with_frees
from moai.lower.operators import is_view, overlaps_itself
from moai.lower.placing import Placer
from moai.lower.program import Instruction, Program, Slot
from moai.lower.values import Values
from moai.plan.plan import Plan

_names = (f"step{i}" for i in itertools.count())


def lower(graph: StepGraph, plan: Plan, given: Sequence[Placement | None]) -> Program:
    """The program that runs `graph` on `plan.dp` devices.

    `given[i]` is the placement that input i has on the devices, or None where it is still on the host:
    `Program.inputs[i].placement` then says how it is to be uploaded.

    Raises RuntimeError for operators that cannot give one device's result on several devices.
    """
    n = plan.dp
    nodes, types, outputs = canonical(graph)
    values = Values(types)
    for input_, placement in zip(graph.inputs, _input_placements(graph, n, given), strict=True):
        values.place(input_.id, placement)
    placer = Placer(values, n)
    for node in nodes:
        placer.add(node)
    outputs = _placed_outputs(graph, outputs, placer, values)

    code = without_dead(placer.code, outputs)
    code, renamed = without_repetitions(code, values)
    outputs = [renamed.get(o, o) for o in outputs]
    code = bucketed(code, values)
    donated = _donated(graph)
    borrowed = [i.id for k, i in enumerate(graph.inputs) if k not in donated]
    code, renamed = in_place(code, borrowed, outputs, values)
    outputs = [renamed.get(o, o) for o in outputs]
    code, outputs = _outputs_apart(code, outputs, set(borrowed), values)
    code = with_frees(code, {*outputs, *borrowed})

    inputs = [i.id for i in graph.inputs]
    program = Program(
        name=next(_names),
        n_devices=n,
        inputs=tuple(Slot(i, values.types[i], values.placement(i), k in donated) for k, i in enumerate(inputs)),
        outputs=tuple(
            Slot(id_, values.types[id_], values.placement(id_), replaces=out.replaces)
            for id_, out in zip(outputs, graph.outputs, strict=True)
        ),
        n_scalars=graph.n_scalars,
        instructions=tuple(code),
        peak_bytes=peak_bytes(code, inputs, values),
        resident_bytes=sum(map(values.local_bytes, inputs)),
        notes=tuple(placer.notes),
    )
    check(program)
    return program


def global_batch(graph: StepGraph, given: Sequence[Placement | None]) -> int:
    """The number of samples in the step, 0 if there are none: the most common leading length of what is split already,
    or else of the batch inputs. The longest of equally common ones: position ids and masks come as [1, ...].
    """
    shapes = [graph.types[i.id].shape for i in graph.inputs]
    split = [shape[0] for shape, p in zip(shapes, given, strict=True) if isinstance(p, Shard) and p.dim == 0]
    leading = [shape[0] for shape, i in zip(shapes, graph.inputs, strict=True) if i.batch and shape and shape[0]]
    lengths = Counter(split or leading)
    return max(lengths, key=lambda length: (lengths[length], length), default=0)


def _input_placements(graph: StepGraph, n: int, given: Sequence[Placement | None]) -> list[Placement]:
    if len(given) != len(graph.inputs):
        raise ValueError(f"{len(graph.inputs)} inputs, but {len(given)} placements were given")
    batch = global_batch(graph, given)

    def choose(input_: Input, present: Placement | None) -> Placement:
        if n == 1:
            return REPLICATE
        if present is not None:
            return present
        shape = graph.types[input_.id].shape
        # With fewer samples than devices some parts would be empty, which kernels do not expect.
        if input_.batch and shape and shape[0] == batch >= n:
            return Shard(0, split_evenly(batch, n))
        return REPLICATE

    return [choose(i, p) for i, p in zip(graph.inputs, given, strict=True)]


def _donated(graph: StepGraph) -> set[int]:
    """Inputs whose buffers the program may overwrite: nobody needs their content after the step."""
    replaced = {o.replaces for o in graph.outputs}
    return {k for k, i in enumerate(graph.inputs) if i.dies or k in replaced}


def _placed_outputs(graph: StepGraph, outputs: Sequence[int], placer: Placer, values: Values) -> list[int]:
    """The values to put out. What takes the place of a whole tensor is whole, as the next step expects it to be.

    A single number is summed, since scripts read those (losses, counts, norms). Any other sum may stay in terms:
    gradients, to which the next segment adds its own. Samples stay split.
    """
    origin = graph.nodes[-1].origin if graph.nodes else Origin("forward")
    found = []
    for id_, out in zip(outputs, graph.outputs, strict=True):
        id_ = placer.settled(id_)
        taken_over = None if out.replaces is None else values.placement(graph.inputs[out.replaces].id)
        one_number = values.types[id_].numel == 1
        if one_number or isinstance(taken_over, Replicate):
            id_ = placer.placed(id_, REPLICATE, origin)
        found.append(id_)
    return found


def _outputs_apart(
    code: list[Instruction], outputs: list[int], borrowed: set[int], values: Values
) -> tuple[list[Instruction], list[int]]:
    """Give every output memory of its own: a later program may overwrite one and must not change another.

    Copied is what shares memory with an earlier output or with an input that stays, what holds several entries in
    one place, and what would keep a much larger buffer alive.
    """
    regions = Regions()
    overlapping: set[int] = set()
    for instruction in code:
        regions.follow(instruction)
        inherited = is_view(instruction.op) and not overlapping.isdisjoint(uses(instruction))
        if inherited or overlaps_itself(instruction):
            overlapping.update(flat_ids(instruction.outs))
    taken = {regions.find(i) for i in borrowed}
    apart = []
    for id_ in outputs:
        region = regions.find(id_)
        if region in taken or id_ in overlapping or values.local_bytes(id_) < values.local_bytes(region):
            copy = values.new(values.types[id_], values.placement(id_))
            shapes = (values.local_shape(copy),)
            code = [*code, Instruction("aten.clone.default", (Ref(id_),), {}, copy, (), shapes)]
            apart.append(copy)
        else:
            taken.add(region)
            apart.append(id_)
    return code, apart
