"""Which dims of a graph's tensors go together: split one of them, and all of them are split alike.

In: canonical nodes and their types. Out: classes of (value, dim). Two dims are of one class where an operator runs one
loop over both. The heads of a layer, from the rows of the query's weight to the columns of the output's, are a class;
so are the columns and rows of its two feed-forward matrices, and the vocabulary. The hidden size is one too, but norms
need it whole: a class is *bound* where some operator does.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction

import torch

from moai.graph.rules import rule_of
from moai.graph.rules.dims import Blocked, Call, Dims, Unit, factor_of
from moai.graph.rules.indexing import INTO_ZEROS
from moai.graph.rules.matmul import einsum
from moai.graph.step_graph import Node, TensorType, flat_ids

aten = torch.ops.aten

Dim = tuple[int, int]  # value, dim
Runs = int | Fraction

# What `lower` takes apart when it is split, as it is then.
_TAKEN_APART = {
    aten.addmm.default: "mk,kn->mn",
    aten.baddbmm.default: "bmk,bkn->bmn",
    aten.addmv.default: "mk,k->m",
}
_PRODUCTS = frozenset({aten.mm.default, aten.bmm.default, aten.mv.default, *_TAKEN_APART})


@dataclass
class DimClass:
    """dims: its members, with the number of equal runs that each consists of. steps: the length of the shortest member
    in steps of its own, the most devices that the class can be split over. bound: whether an operator needs a member
    whole. terms: bytes of results that a split of the class leaves in terms. multiplied: whether a matrix product runs
    over it.
    """

    dims: dict[Dim, int] = field(default_factory=dict)
    steps: int = 0
    bound: bool = False
    terms: int = 0
    multiplied: bool = False


def dim_classes(nodes: Iterable[Node], types: Mapping[int, TensorType]) -> list[DimClass]:
    """The classes of all dims longer than one. The optimizer's nodes are not looked at: they follow."""
    walk = _Walk(types)
    zeros: set[int] = set()
    for node in nodes:
        if node.op is aten.full.default and node.args[1] == 0:
            zeros.update(flat_ids(node.outs))
        if node.origin.phase != "optimizer" and not node.op.name().startswith("aten::_foreach_"):
            call = Call(node, walk.typed)
            walk.add(call, _dims(call, zeros))
    return walk.classes()


def _dims(call: Call, zeros: set[int]) -> Dims | None:
    equation = _TAKEN_APART.get(call.op)
    if equation is not None:
        product = einsum(equation)(call)
        assert product is not None
        rule = rule_of(call.op)
        plain = rule(call) if rule else None
        bias = plain.inputs[0] if plain else (None,)
        return Dims((bias, *product.inputs), product.outputs, product.summed)
    into_zeros = INTO_ZEROS.get(call.op)
    rule = into_zeros if into_zeros and call["self"].id in zeros else rule_of(call.op)
    return None if rule is None else rule(call)


class _Walk:
    """Sets of dims, joined one operator at a time. `_up[d]` is (a dim nearer the root, runs of d for one of its).

    Nearly always that is one for one, the int 1, with which numbers are multiplied much faster than as a fraction."""

    def __init__(self, types: Mapping[int, TensorType]):
        self.typed = types
        self._up: dict[Dim, tuple[Dim, Runs]] = {}
        self._bound: set[Dim] = set()
        self._steps: dict[Dim, int] = {}
        self._terms: list[tuple[Dim, int]] = []
        self._multiplied: set[Dim] = set()

    def add(self, call: Call, dims: Dims | None) -> None:
        ids = [*call.input_ids, *flat_ids(call.node.outs)]
        if dims is None:
            for id_ in ids:
                self._bound.update((id_, d) for d, s in enumerate(self.typed[id_].shape) if s > 1)
            return
        members: dict[object, tuple[Dim, int]] = {}  # factor -> its first dim, and the runs of that
        for id_, factors in zip(ids, (*dims.inputs, *dims.outputs), strict=True):
            for d, entry in enumerate(factors):
                self._enter((id_, d), entry, members)
        left = {f for f in dims.summed | dims.maxed if f in members}
        for factor in left:
            for type_, factors in zip(call.outputs, dims.outputs, strict=True):
                if all(factor_of(e) != factor for e in factors):
                    self._terms.append((members[factor][0], type_.nbytes))
        if call.op in _PRODUCTS:
            self._multiplied.update(dim for dim, _ in members.values())

    def _enter(self, dim: Dim, entry: object, members: dict[object, tuple[Dim, int]]) -> None:
        length = self.typed[dim[0]].shape[dim[1]]
        if length == 1:
            return
        if entry is None:
            self._bound.add(dim)
            return
        unit = entry.size if isinstance(entry, Unit) else 1
        runs = entry.blocks if isinstance(entry, Blocked) else 1
        self._steps[dim] = min(self._steps.get(dim, length), length // unit // runs)
        first, runs_of_first = members.setdefault(factor_of(entry), (dim, runs))
        if first != dim:
            self._join(dim, first, _ratio(runs, runs_of_first))

    def _find(self, dim: Dim) -> tuple[Dim, Runs]:
        """The root of a dim's set, and the runs of the dim for one of the root's. What lies on the way is led there."""
        way = []
        while dim in self._up:
            way.append(dim)
            dim, _ = self._up[dim]
        runs: Runs = 1
        for passed in reversed(way):
            runs *= self._up[passed][1]
            self._up[passed] = (dim, runs)
        return dim, runs

    def _join(self, a: Dim, b: Dim, runs: Runs) -> None:
        """`a` consists of `runs` times as many runs as `b`."""
        root_a, of_a = self._find(a)
        root_b, of_b = self._find(b)
        if root_a != root_b:
            self._up[root_a] = (root_b, _ratio(runs * of_b, of_a))
        elif of_a != runs * of_b:
            self._bound.add(root_a)

    def classes(self) -> list[DimClass]:
        found: dict[Dim, DimClass] = {}
        runs: dict[Dim, dict[Dim, Runs]] = {}
        for dim in {*self._steps, *self._bound}:
            root, of_dim = self._find(dim)
            runs.setdefault(root, {})[dim] = of_dim
        for root, members in runs.items():
            fewest = min(members.values())
            of_fewest = {d: _ratio(r, fewest) for d, r in members.items()}
            dims = {d: int(r) for d, r in of_fewest.items()}
            bound = any(d in self._bound or r.denominator > 1 for d, r in of_fewest.items())
            steps = min((self._steps[d] for d in members if d in self._steps), default=0)
            found[root] = DimClass(dims, steps, bound)
        for dim, nbytes in self._terms:
            found[self._find(dim)[0]].terms += nbytes
        for dim in self._multiplied:
            found[self._find(dim)[0]].multiplied = True
        return list(found.values())


def _ratio(a: Runs, b: Runs) -> Runs:
    return 1 if a == b else Fraction(a) / b
