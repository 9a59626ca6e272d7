"""Where a program's inputs lie: as they come, and as the nodes are to find them.

In: the graph, the plan, the placements of what lies on the devices already, and which dims tensor parallelism splits.
Out: for each input an `Arrival`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from moai.graph.placement import REPLICATE, TIME, Mesh, Placement, Shard, split_evenly, split_nested
from moai.graph.step_graph import StepGraph, TensorType
from moai.plan.plan import Plan

# Spreading smaller states saves nothing, and each would be a message.
_MIN_STATE = 1024


@dataclass(frozen=True, slots=True)
class Arrival:
    """present: how the input lies when the program starts. wanted: how the nodes are to find it. stored: whether it is
    a state that is spread over devices, and gathered where layers use it."""

    present: Placement
    wanted: Placement
    stored: bool = False


def arrivals(
    graph: StepGraph, plan: Plan, mesh: Mesh, given: Sequence[Placement | None], tensor_parallel: Mapping[int, Shard]
) -> list[Arrival]:
    """`tensor_parallel`: the shard over "tp" of inputs, by their index. An input that is not on the devices yet is
    uploaded as wanted; one that the step replaces may come back in another placement than it had."""
    if len(given) != len(graph.inputs):
        raise ValueError(f"{len(graph.inputs)} inputs, but {len(given)} placements were given")
    batch = global_batch(graph, given)
    replaced = {o.replaces for o in graph.outputs}
    found = []
    for k, (input_, present) in enumerate(zip(graph.inputs, given, strict=True)):
        type_ = graph.types[input_.id]
        if input_.batch:
            found.append(_of_data(type_, batch, plan, mesh, present))
        else:
            passing = input_.dies and k not in replaced  # an activation or a gradient of an earlier segment
            if passing and present is not None:
                found.append(Arrival(present, present))
            else:
                found.append(_of_state(type_, plan, mesh, present, tensor_parallel.get(k), k in replaced))
    return found


def global_batch(graph: StepGraph, given: Sequence[Placement | None]) -> int:
    """The number of samples in the step, 0 if there are none: the most common leading length of what is split already,
    or else of the batch inputs. The longest of equally common ones: position ids and masks come as [1, ...].
    """
    split, leading = [], []
    for input_, placement in zip(graph.inputs, given, strict=True):
        shape = graph.types[input_.id].shape
        if placement is not None and any(s.dim == 0 and s.axes != ("tp",) for s in placement.shards) and input_.batch:
            split.append(shape[0])
        if input_.batch and shape and shape[0]:
            leading.append(shape[0])
    lengths = Counter(split or leading)
    return max(lengths, key=lambda length: (lengths[length], length), default=0)


def _of_data(type_: TensorType, batch: int, plan: Plan, mesh: Mesh, present: Placement | None) -> Arrival:
    axes = tuple(a for a in plan.batch_axes if a in mesh.sizes)
    shape = type_.shape
    # With fewer samples than parts some parts would be empty, which kernels do not expect.
    if not axes or not shape or shape[0] != batch or batch < mesh.count(axes):
        return Arrival(present or REPLICATE, present or REPLICATE)
    parts = Placement((Shard(0, axes, split_nested(batch, [mesh.sizes[a] for a in axes])),))
    outer = axes[:-1] if axes[-1] == TIME else axes
    whole = REPLICATE
    if outer:
        whole = Placement((Shard(0, outer, split_nested(batch, [mesh.sizes[a] for a in outer])),))
    present = whole if present is None else present
    # Over devices, the nodes cut micro-batches where they need them; over passes alone nothing else tells them to.
    return Arrival(present, parts if not outer and present == REPLICATE else present)


def _of_state(
    type_: TensorType, plan: Plan, mesh: Mesh, present: Placement | None, tensor_parallel: Shard | None, replaced: bool
) -> Arrival:
    shards = [] if tensor_parallel is None else [tensor_parallel]
    spread = _spread(type_, plan, mesh, tensor_parallel)
    if spread is not None:
        shards.append(spread)
    wanted = Placement(tuple(sorted(shards, key=lambda s: s.dim)))
    if present is None:
        return Arrival(wanted, wanted, spread is not None)
    # Where the step puts a new content in its place, it can lie anew: what was made on the devices is whole at first,
    # and an earlier graph may have seen too little of the model.
    if replaced and shards:
        return Arrival(present, wanted, spread is not None)
    stored = any(plan.shard_axis in s.axes for s in present.shards) and plan.distribute_param
    return Arrival(present, present, stored)


def _spread(type_: TensorType, plan: Plan, mesh: Mesh, taken: Shard | None) -> Shard | None:
    """The shard of a state over the devices that share the batch: along the first dim that is long enough."""
    axis = plan.shard_axis
    if not plan.distribute_param or axis not in mesh.sizes:
        return None
    if not type_.dtype.is_floating_point or type_.numel < _MIN_STATE:
        return None
    parts = mesh.sizes[axis]
    for dim, length in enumerate(type_.shape):
        if length >= parts and (taken is None or taken.dim != dim):
            return Shard(dim, (axis,), split_evenly(length, parts))
    return None


def batch_sizes(graph: StepGraph) -> list[int]:
    """The lengths of the first dims of the step's data, the most frequent first; those of one sample for all count."""
    shapes = [graph.types[i.id].shape for i in graph.inputs if i.batch]
    lengths = [shape[0] for shape in shapes if shape and shape[0]]
    return sorted(set(lengths), key=lambda length: (-lengths.count(length), -length))
