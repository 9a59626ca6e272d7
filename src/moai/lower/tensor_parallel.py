"""Tensor parallelism, found from the graph: which dims of which weights are split over "tp".

In: canonical nodes, the values, the graph's inputs, the plan. Out: the nodes, with operators that look up by class or
vocabulary entry in a form that can be split where it is; the shards of inputs; the shards that sums should end in.

Dims are taken class by class (`dim_classes`): the heads of each layer, its feed-forward width, the vocabulary. A class
may be split if no operator needs it whole, and every weight in it if no other class has split that weight. Classes
that leave the fewest bytes to be summed for the weights they split come first. For a transformer that is the pattern of
Shoeybi et al., "Megatron-LM", arXiv:1909.08053: two sums a layer in the forward, two in the backward.

Between these products, what runs along the sequence is split along it: a sum ends in parts, norms and residuals work on
parts, and a product gathers them (Korthikanti et al., "Reducing activation recomputation in large transformer models",
arXiv:2205.05198). That moves the same number of bytes, and holds and computes a tp-th of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from moai.graph.placement import Shard, split_evenly
from moai.graph.step_graph import Input, Node, StepGraph, TensorType
from moai.lower.dim_classes import DimClass, dim_classes
from moai.lower.heads import own_key_heads
from moai.lower.part_forms import part_forms
from moai.lower.values import Values
from moai.lower.wishes import Wishes, wishes
from moai.plan.errors import PlanError
from moai.plan.nearest import nearest
from moai.plan.plan import Plan

moai = torch.ops.moai

# A table that no product runs over is worth its messages if it is a large part of the model.
_WORTH_IT = 0.02


@dataclass(frozen=True)
class TensorParallel:
    """inputs: the shard of each input that is split, by its index. sums: what values that are left in terms over "tp"
    should become. gradients: shards of what the optimizer meets the split weights with."""

    nodes: list[Node]
    inputs: dict[int, Shard]
    sums: Wishes
    gradients: Wishes


def tensor_parallel(nodes: list[Node], values: Values, graph: StepGraph, plan: Plan) -> TensorParallel:
    """`nodes` are those of `graph`. Raises PlanError where the devices do not divide the heads of an attention."""
    if plan.tp == 1:
        return TensorParallel(nodes, {}, {}, {})
    _check_heads(nodes, values, plan)
    nodes = own_key_heads(nodes, values, plan.tp)
    forms = list(part_forms(nodes, values))
    in_parts = {id(f.node): f.nodes for f in forms}
    states = _states(graph, values)
    all_parts = [part for n in nodes for part in in_parts.get(id(n), (n,))]
    classes = dim_classes(all_parts, values.types)
    data = {(i.id, d) for i in graph.inputs if i.batch for d in range(_data_dims(values.types[i.id]))}
    chosen = _chosen([c for c in classes if data.isdisjoint(c.dims)], states, values, plan.tp)
    split = {dim for c in chosen for dim in c.dims}
    for c in chosen:
        for dim, runs in c.dims.items():
            if runs > 1:
                values.mark_split_inside(*dim)
    kept = {id(f.node) for f in forms if (f.value, f.dim) in split}
    nodes = [part for n in nodes for part in (in_parts[id(n)] if id(n) in kept else (n,))]
    shards = {i: (s,) for c in chosen for i, s in _shards(c, states, values, plan.tp).items()}
    alike = wishes(nodes, values.types, shards)  # moments lie as their weights do
    by_input = {k: alike[i][0] for i, k in states.items() if i in alike}
    sums = _along_the_sequence(classes, graph.inputs, values, plan.tp) if chosen else {}
    return TensorParallel(nodes, by_input, sums, alike)


def _states(graph: StepGraph, values: Values) -> dict[int, int]:
    """Weights and what lies beside them, by id with their index. What dies in the step and is not replaced by it is
    none of them: it only passes through, like activations where a script reads a value in the middle of a step."""
    replaced = {o.replaces for o in graph.outputs}
    return {
        i.id: k
        for k, i in enumerate(graph.inputs)
        if not i.batch and (k in replaced or not i.dies) and values.types[i.id].dtype.is_floating_point
    }


def _data_dims(type_: TensorType) -> int:
    """How many dims of a batch input samples and tokens run along: these are the plan's to split over other axes."""
    return min(len(type_.shape), 1) if type_.dtype.is_floating_point else len(type_.shape)


def _along_the_sequence(classes: Sequence[DimClass], inputs: Sequence[Input], values: Values, tp: int) -> Wishes:
    """Shards along the dim that goes with the second one of the batch's token numbers."""
    tokens = {
        (i.id, 1) for i in inputs if i.batch and not (t := values.types[i.id]).dtype.is_floating_point
        if len(t.shape) == 2 and t.shape[1] >= tp
    }  # fmt: skip
    found: Wishes = {}
    for c in classes:
        if not tokens.isdisjoint(c.dims):
            for (id_, dim), runs in c.dims.items():
                if runs == 1 and c.steps >= tp:
                    found[id_] = (_shard(c, id_, dim, values, tp),)
    return found


def _chosen(classes: Sequence[DimClass], states: dict[int, int], values: Values, tp: int) -> list[DimClass]:
    if not any(c.multiplied for c in classes):
        return []  # too little of the model to know
    total = sum(values.types[i].nbytes for i in states)

    def weights(c: DimClass) -> dict[int, int]:
        return {i: values.types[i].nbytes for i, _ in c.dims if i in states}

    candidates = []
    for c in classes:
        nbytes = sum(weights(c).values())
        # An input whose dims meet in one class cannot be split along both.
        once = len(weights(c)) == sum(i in states for i, _ in c.dims)
        worth_it = c.multiplied or nbytes > _WORTH_IT * total
        if nbytes and once and worth_it and not c.bound and c.steps >= tp and _sums_less_than_it_spreads(c, values):
            candidates.append((c.terms / nbytes, c))
    taken: set[int] = set()
    found = []
    for _, c in sorted(candidates, key=lambda pair: pair[0]):
        if taken.isdisjoint(weights(c)):
            taken.update(weights(c))
            found.append(c)
    return found


def _sums_less_than_it_spreads(c: DimClass, values: Values) -> bool:
    """The width of a head is no class to split: all scores would have to be summed."""
    return c.terms <= sum(values.types[i].nbytes for i, _ in c.dims)


def _shards(c: DimClass, states: dict[int, int], values: Values, tp: int) -> dict[int, Shard]:
    return {id_: _shard(c, id_, dim, values, tp) for id_, dim in c.dims if id_ in states}


def _shard(c: DimClass, id_: int, dim: int, values: Values, tp: int) -> Shard:
    """How dim `dim` of value `id_`, a member of `c`, lies where that is split."""
    runs = c.dims[id_, dim]
    unit = values.types[id_].shape[dim] // runs // c.steps
    return Shard(dim, ("tp",), tuple(s * unit for s in split_evenly(c.steps, tp)), runs)


def _check_heads(nodes: Sequence[Node], values: Values, plan: Plan) -> None:
    for node in nodes:
        if node.op is moai.sdpa.default:
            query = values.types[node.args[0].id].shape
            heads = query[-3] if len(query) > 3 else plan.tp
            if heads % plan.tp:
                where = f" ({node.origin.where})" if node.origin.where else ""
                other = nearest(plan, plan.n_devices, lambda p: heads % p.tp == 0)  # noqa: B023 (called at once)
                raise PlanError(f"tp={plan.tp} does not divide the {heads} attention heads{where}.", other)
