"""Which dims of a graph's tensors go together: split one of them, and all of them are split alike.

In: canonical nodes and their types. Out: classes of (value, dim). Two dims are of one class where an operator runs one
loop over both. The heads of a layer, from the rows of the query's weight to the columns of the output's, are a class;
so are the columns and rows of its two feed-forward matrices, and the vocabulary. The hidden size is one too, but norms
need it whole: a class is *bound* where some operator does.

A dim may be several loops, one within another: the rows of a fused weight are 3 times the heads times their width. Each
of these is a class of its own, and the dim a member of all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from moai.graph.rules import rule_of
from moai.graph.rules.dims import Blocked, Call, Dims, Nested, Unit, common_loops, factors_of, shared_out
from moai.graph.rules.indexing import INTO_ZEROS
from moai.graph.rules.matmul import einsum
from moai.graph.rules.views import reshape_inside
from moai.graph.step_graph import Node, TensorType, flat_ids

aten = torch.ops.aten

Dim = tuple[int, int]  # value, dim

# What `lower` takes apart when it is split, as it is then.
_TAKEN_APART = {
    aten.addmm.default: "mk,kn->mn",
    aten.baddbmm.default: "bmk,bkn->bmn",
    aten.addmv.default: "mk,k->m",
}
PRODUCTS = frozenset(
    {
        aten.mm.default, aten.bmm.default, aten.mv.default, torch.ops.moai.matmul.default, aten._grouped_mm.default,
        torch.ops.moai.rows_mm.default, torch.ops.moai.rows_outer.default,
        *_TAKEN_APART,
    }
)  # fmt: skip


@dataclass
class DimClass:
    """dims: its members, with the number of equal runs that each consists of. steps: the length of its loop, the most
    devices that it can be split over. bound: whether an operator needs a member whole. terms: bytes of results that a
    split of the class leaves in terms. multiplied: whether a matrix product runs over it.
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
    constants: set[int] = set()
    for node in nodes:
        if node.op is aten.full.default and node.args[1] == 0:
            zeros.update(flat_ids(node.outs))
        if node.origin.phase != "optimizer" and not node.op.name().startswith("aten::_foreach_"):
            call = Call(node, walk.typed)
            if constants.issuperset(call.input_ids):
                constants.update(flat_ids(node.outs))  # from numbers alone: every device can make it whole
            else:
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
    if call.op is aten.reshape.default:
        return reshape_inside(call, lambda id_, dim: True)
    into_zeros = INTO_ZEROS.get(call.op)
    rule = into_zeros if into_zeros and call["self"].id in zeros else rule_of(call.op)
    return None if rule is None else rule(call)


class _Walk:
    """Loops, joined one operator at a time. A loop is a number; `_up[n]` is one that it is joined to (or itself), and
    `_within[n]` are those that it has been found to consist of."""

    def __init__(self, types: Mapping[int, TensorType]):
        self.typed = types
        self._loop_of: dict[Dim, int] = {}
        self._up: list[int] = []
        self._length: list[int] = []
        self._within: dict[int, list[int]] = {}
        self._bound: set[int] = set()
        self._terms: list[tuple[Sequence[int], int]] = []
        self._multiplied: set[int] = set()

    def add(self, call: Call, dims: Dims | None) -> None:
        ids = [*call.input_ids, *flat_ids(call.node.outs)]
        if dims is None:
            for id_ in ids:
                self._bound.update([self._loop((id_, d)) for d, s in enumerate(self.typed[id_].shape) if s > 1])
            return
        members: dict[object, Sequence[int]] = {}  # factor -> the loops of its first dim
        for id_, factors in zip(ids, (*dims.inputs, *dims.outputs), strict=True):
            shape = self.typed[id_].shape
            for d, entry in enumerate(factors):
                if shape[d] != 1:
                    self._enter(self._loop((id_, d)), entry, members)
        left = {f for f in dims.summed | dims.maxed if f in members}
        for factor in left:
            for type_, factors in zip(call.outputs, dims.outputs, strict=True):
                if all(factor not in factors_of(e) for e in factors):
                    self._terms.append((members[factor], type_.nbytes))
        if call.op in PRODUCTS:
            self._multiplied.update([loop for loops in members.values() for loop in loops])

    def _enter(self, loop: int, entry: object, members: dict[object, Sequence[int]]) -> None:
        if entry is None:
            self._bound.add(loop)
            return
        kind = type(entry)
        if kind is not Unit and kind is not Blocked and kind is not Nested:
            first = members.setdefault(entry, (loop,))
            if first[0] != loop:
                self._join((loop,), first)
            return
        runs = _loops(entry, self._length[loop])
        parts = self._cut(loop, tuple([n for _, n in runs]))
        for (factor, _), part in zip(runs, parts, strict=True):
            if factor is None:
                self._bound.update(part)
            elif part:
                self._join(part, members.setdefault(factor, part))

    def _loop(self, dim: Dim) -> int:
        found = self._loop_of.get(dim)
        if found is None:
            found = self._loop_of[dim] = self._new(self.typed[dim[0]].shape[dim[1]])
        return found

    def _new(self, length: int) -> int:
        self._up.append(len(self._up))
        self._length.append(length)
        return len(self._up) - 1

    def _find(self, loop: int) -> int:
        """What `loop` is joined to. The way there is made shorter."""
        up = self._up
        while up[loop] != loop:
            up[loop] = up[up[loop]]
            loop = up[loop]
        return loop

    def _leaves(self, loops: Sequence[int]) -> list[int]:
        """The loops that `loops` are or consist of, outermost first."""
        found: list[int] = []
        for loop in loops:
            root = self._find(loop)
            within = self._within.get(root)
            found += (root,) if within is None else self._leaves(within)
        return found

    def _cut(self, loop: int, lengths: tuple[int, ...]) -> list[list[int]]:
        """What each of `lengths`, whose product is the length of `loop`, consists of. Where that cannot be told, the
        loop is bound, and nothing consists of it."""
        leaves = self._refined((loop,), lengths)
        if leaves is None:
            self._bound.add(loop)
            return [[] for _ in lengths]
        return shared_out(leaves, [self._length[n] for n in leaves], lengths)

    def _refined(self, loops: Sequence[int], lengths: tuple[int, ...]) -> list[int] | None:
        """The leaves of `loops`, none of which reaches over an end of `lengths` any more. None: they cross."""
        while True:
            leaves = self._leaves(loops)
            own = tuple([self._length[n] for n in leaves])
            common = common_loops(own, lengths)
            if common is None or common == own:
                return None if common is None else leaves
            for leaf, parts in zip(leaves, shared_out(common, common, own), strict=True):
                if len(parts) > 1 and leaf not in self._within:
                    self._within[leaf] = [self._new(n) for n in parts]

    def _join(self, a: Sequence[int], b: Sequence[int]) -> None:
        """The loops `a` are the loops `b`."""
        if len(a) == len(b) == 1:
            one, other = self._find(a[0]), self._find(b[0])
            if one == other:
                return
            if self._length[one] == self._length[other] and one not in self._within and other not in self._within:
                self._up[one] = other
                return
        while True:
            of_a, of_b = self._leaves(a), self._leaves(b)
            lengths_a, lengths_b = (tuple([self._length[n] for n in leaves]) for leaves in (of_a, of_b))
            if lengths_a == lengths_b:
                break
            if self._refined(of_a, lengths_b) is None or self._refined(of_b, lengths_a) is None:
                self._bound.update((*of_a, *of_b))
                return
        for one, other in zip(of_a, of_b, strict=True):
            self._up[self._find(one)] = self._find(other)

    def classes(self) -> list[DimClass]:
        found: dict[int, DimClass] = {}
        for dim, loop in self._loop_of.items():
            runs = 1
            for leaf in self._leaves((loop,)):
                length = self._length[leaf]
                class_ = found.get(leaf)
                if class_ is None:
                    class_ = found[leaf] = DimClass(steps=length)
                if dim in class_.dims:
                    class_.bound = True  # the dim runs over it twice
                class_.dims[dim] = runs
                runs *= length
        for leaf in self._leaves(tuple(self._bound)):
            found[leaf].bound = True
        for leaf in self._leaves(tuple(self._multiplied)):
            found[leaf].multiplied = True
        for loops, nbytes in self._terms:
            for leaf in self._leaves(loops):
                found[leaf].terms += nbytes
        return list(found.values())


def _loops(entry: Any, length: int) -> tuple[tuple[object, int], ...]:
    """The loops that a dim of `length` with this entry consists of: their factors, None where it has to be whole."""
    if type(entry) is Nested:
        return entry.loops
    if type(entry) is Blocked:
        return (None, entry.blocks), (entry.factor, length // entry.blocks)
    return (entry.factor, length // entry.size), (None, entry.size)
