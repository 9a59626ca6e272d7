"""Batched products whose batch dims a script has flattened into one get them back.

In: nodes. Out: nodes in which what is done to [samples * heads, ...], from the view that makes it to the one that takes
it apart, is done to [samples, heads, ...]. Flattened, such a dim could be split over one of its loops at a time; so it
is over samples and heads at once. aten.bmm takes one batch dim, and becomes moai.matmul, which takes any number.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch

from moai.graph.rules import rule_of
from moai.graph.rules.dims import (
    Blocked,
    Call,
    DimFactors,
    Dims,
    Nested,
    Unit,
    argument_names,
    common_loops,
    shared_out,
)
from moai.graph.rules.pointwise import pointwise
from moai.graph.rules.views import groups
from moai.graph.step_graph import Node, Ref, TensorType, flat_ids, map_args, refs
from moai.lower.decompose import Builder, times
from moai.lower.values import Values

aten = torch.ops.aten
moai = torch.ops.moai

Lengths = tuple[int, ...]
Apart = tuple[Lengths, ...]  # for each dim of a tensor, the lengths of the dims that it is made of


@dataclass(frozen=True, slots=True)
class _Form:
    """`fine` is the tensor with its flattened dims taken apart."""

    fine: Ref
    apart: Apart


def with_batch_dims(nodes: Sequence[Node], values: Values, outputs: Iterable[int]) -> list[Node]:
    """`outputs` keep their ids and shapes."""
    wanted = _multiplied(nodes)
    if not wanted:
        return list(nodes)
    walk = _Walk(values, wanted)
    for node in nodes:
        walk.add(node)
    for id_ in outputs:
        walk.flatten(id_, nodes[-1])
    return walk.nodes


def _multiplied(nodes: Sequence[Node]) -> set[int]:
    """Values that batched products are given, or what these are made of without a reshape."""
    found: set[int] = set()
    for node in reversed(nodes):
        if node.op in _PRODUCTS or (not found.isdisjoint(flat_ids(node.outs)) and _is_known(node.op)):
            found.update([r.id for r in refs((node.args, node.kwargs))])
    return found


class _Walk:
    """One pass over the nodes. A flattened tensor is made only for those that cannot do without."""

    def __init__(self, values: Values, wanted: set[int]):
        self.nodes: list[Node] = []
        self._values = values
        self._wanted = wanted
        self._forms: dict[int, _Form] = {}
        self._flat: set[int] = set()  # of those with forms, the ones that are there in one piece as well
        self._same: dict[int, int] = {}  # values that are not made, for others that are the same

    def add(self, node: Node) -> None:
        if self._same:
            node = self._renamed(node)
        if node.op is aten.reshape.default and (node.outs in self._wanted or node.args[0].id in self._forms):
            self._reshape(node)
            return
        ids = [r.id for r in refs((node.args, node.kwargs))]
        if not self._forms.keys().isdisjoint(ids) and not (_is_known(node.op) and self._apart(node)):
            for id_ in ids:
                self.flatten(id_, node)
            self.nodes.append(node)
        elif self._forms.keys().isdisjoint(ids):
            self.nodes.append(node)

    def flatten(self, id_: int, user: Node) -> None:
        """Have value `id_` there in one piece."""
        source = self._forms[id_].fine if id_ in self._forms else Ref(self._same.get(id_, id_))
        if source.id != id_ and id_ not in self._flat:
            self._flat.add(id_)
            shape = self._values.types[id_].shape
            self.nodes.append(Node(aten.reshape.default, (source, shape), {}, id_, user.origin))

    def _reshape(self, node: Node) -> None:
        form = self._forms.get(node.args[0].id)
        source = form.fine if form else node.args[0]
        shape = self._values.types[node.outs].shape
        apart = _taken_apart(self._values.types[source.id].shape, shape) if node.outs in self._wanted else None
        if apart is None and self._values.types[source.id].shape == shape:
            self._same[node.outs] = source.id
        elif apart is None:
            self.nodes.append(replace(node, args=(source, shape)))
        else:
            self._forms[node.outs] = _Form(self._in_shape(source, _joined(apart), node), apart)

    def _renamed(self, node: Node) -> Node:
        if all(r.id not in self._same for r in refs((node.args, node.kwargs))):
            return node
        args, kwargs = map_args(
            (node.args, node.kwargs),
            lambda leaf: Ref(self._same.get(leaf.id, leaf.id)) if isinstance(leaf, Ref) else leaf,
        )
        return replace(node, args=args, kwargs=kwargs)

    def _in_shape(self, source: Ref, shape: Lengths, user: Node) -> Ref:
        type_ = self._values.types[source.id]
        if type_.shape == shape:
            return source
        out = self._values.new(TensorType(shape, type_.dtype))
        self.nodes.append(Node(aten.reshape.default, (source, shape), {}, out, user.origin))
        return Ref(out)

    def _apart(self, node: Node) -> bool:
        """Do what `node` does on tensors with their dims taken apart, if that is possible."""
        call = Call(node, self._values.types)
        rule = rule_of(node.op)
        dims = rule(call) if rule else None
        loops = {} if dims is None else self._loops(call, dims)
        if dims is None or not loops or (node.op in _PRODUCTS and loops.keys() != {"b"}):
            return False
        aligned = node.op not in _DIMS and node.op is not aten.bmm.default
        apart = [
            _apart_of(t, dims.outputs[0] if aligned and (k == 0 or node.op not in _PRODUCTS) else f, loops)
            for k, (t, f) in enumerate(zip(call.inputs, dims.inputs, strict=True))
        ]
        at = _dims_apart(call, apart[0])
        if at is None:
            return False
        fine = []
        for id_, lengths in zip(call.input_ids, apart, strict=True):
            form = self._forms.get(id_)
            fine.append(self._in_shape(form.fine if form else Ref(id_), _joined(lengths), node))
        self._emit(node, fine, at, [_apart_of(t, f, loops) for t, f in zip(call.outputs, dims.outputs, strict=True)])
        return True

    def _loops(self, call: Call, dims: Dims) -> dict[Hashable, Lengths]:
        """The factors that flattened dims run over, with their lengths; none if one of these dims has to be whole."""
        found: dict[Hashable, Lengths] = {}
        for id_, factors in zip(call.input_ids, dims.inputs, strict=True):
            form = self._forms.get(id_)
            for factor, lengths in zip(factors, form.apart if form else (), strict=False):
                if len(lengths) > 1:
                    if factor is None or isinstance(factor, (Unit, Blocked, Nested)):
                        return {}
                    found.setdefault(factor, lengths)
        return found

    def _emit(self, node: Node, fine: Sequence[Ref], at: Any, outputs: Sequence[Apart]) -> None:
        made = {}
        for id_, apart in zip(flat_ids(node.outs), outputs, strict=True):
            made[id_] = self._values.new(TensorType(_joined(apart), self._values.types[id_].dtype))
            self._forms[id_] = _Form(Ref(made[id_]), apart)
        if node.op in _PRODUCTS:
            self.nodes += _product(node, fine, made[node.outs], self._values)
            return
        given = iter(fine)
        args, kwargs = map_args((node.args, node.kwargs), lambda leaf: next(given) if isinstance(leaf, Ref) else leaf)
        if node.op in _DIMS:
            name = argument_names(node.op).index(_DIMS[node.op])
            args = (*args[:name], at, *args[name + 1 :])
        outs = map_args(node.outs, lambda id_: made.get(id_))
        self.nodes.append(Node(node.op, args, kwargs, outs, node.origin))


def _product(node: Node, fine: Sequence[Ref], out: int, values: Values) -> list[Node]:
    call = Call(node, values.types)
    build = Builder(call, values)
    if node.op is aten.bmm.default:
        build(moai.matmul.default, *fine, out=out)
        return build.nodes
    bias, a, b = fine
    product = times(build, build(moai.matmul.default, a, b), call["alpha"])
    build(aten.add.Tensor, product, times(build, bias, call["beta"]), out=out)
    return build.nodes


def _taken_apart(source: Lengths, flat: Lengths) -> Apart | None:
    """What each dim of a reshape's result is flattened from; None if none is."""
    if 0 in source:
        return None
    found: list[Lengths] = [(length,) for length in flat]
    for a, b in groups(source, flat):
        of_a, of_b = tuple(source[d] for d in a), tuple(flat[d] for d in b)
        lengths = common_loops(of_a, of_b) or of_b
        for d, own in zip(b, shared_out(lengths, lengths, of_b), strict=True):
            found[d] = tuple(own)
    return tuple(found) if any(len(lengths) > 1 for lengths in found) else None


def _apart_of(type_: TensorType, factors: DimFactors, loops: dict[Hashable, Lengths]) -> Apart:
    """Of what dims those of a tensor are made, which run over the last of `factors`, or are repeated along them."""
    own = factors[len(factors) - len(type_.shape) :]
    return tuple(
        ((length,) if f not in loops else loops[f] if length != 1 else (1,) * len(loops[f]))
        for f, length in zip(own, type_.shape, strict=True)
    )


def _dims_apart(call: Call, apart: Apart) -> Any:
    """The dims that an operator is told, for tensors taken apart as `apart`. None: one of them is none any more."""
    if call.op not in _DIMS:
        return ()
    starts = [0, *accumulate(map(len, apart))]
    told = call[_DIMS[call.op]]
    rank = len(apart) + (call.op is aten.unsqueeze.default)
    found: list[int] = []
    for d in [d % rank for d in (told if isinstance(told, tuple) else (told,))]:
        if call.op is aten.permute.default:
            found += range(starts[d], starts[d + 1])
        elif call.op is aten.unsqueeze.default or len(apart[d]) == 1:
            found.append(starts[d])
        else:
            return None
    return (tuple(found) or None) if isinstance(told, tuple) else found[0]


def _joined(apart: Apart) -> Lengths:
    return tuple(length for lengths in apart for length in lengths)


def _is_known(op: torch._ops.OpOverload) -> bool:
    return op in _DIMS or op in _PRODUCTS or rule_of(op) is pointwise


_PRODUCTS = frozenset({aten.bmm.default, aten.baddbmm.default})
# Operators that are told dims of their first tensor, with the name of that argument.
_DIMS: dict[torch._ops.OpOverload, str] = {
    aten.permute.default: "dims",
    **dict.fromkeys(
        (
            aten.unsqueeze.default, aten.squeeze.dims, aten.select.int, aten.slice.Tensor, aten._softmax.default,
            aten._safe_softmax.default, aten._softmax_backward_data.default, aten.sum.dim_IntList,
        ),
        "dim",
    ),
}  # fmt: skip
