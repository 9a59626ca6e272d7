"""Experts: rows that a step sorts by their expert stay where they are.

In: canonical nodes of a step whose samples are to be split. Out: the same step without such sorts, where that is
proved.

A mixture of experts sorts the rows of a batch by the expert that each is for, multiplies what lies together by that
expert's matrix, and puts the rows back. Sorting needs all rows, so that every device would have to do everything. But
if each row is treated by itself in between, the order makes no difference: the rows keep theirs, and products are told
which matrix each of them is for (`moai.rows_mm`). That a row is treated by itself is what the sharding rules say: a
loop runs over the dim. Where a use of the sorted rows is not understood, the sort stays.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from moai.graph.rules import rule_of
from moai.graph.rules.dims import Call, factors_of
from moai.graph.step_graph import Node, Ref, Scalar, TensorType, flat_ids, map_args, refs
from moai.lower.canonical import needed

aten = torch.ops.aten
moai = torch.ops.moai

_SORTS = frozenset({aten.sort.default, aten.sort.stable})
_WHOLE_QUOTIENTS = frozenset({aten.floor_divide.default, aten.div.Tensor_mode})


def without_sorts(
    nodes: Sequence[Node], types: Sequence[TensorType], outputs: Sequence[int]
) -> tuple[list[Node], list[TensorType], list[int]]:
    """The nodes, types and outputs. Ids of `types` stay; those of new values come behind them."""
    walk = _Walk(nodes, types, outputs)
    for at, node in enumerate(nodes):
        if node.op in _SORTS and _sorts_rows(node, types):
            _Sorted(walk, at).rewrite()
    if not walk.edits:
        return list(nodes), list(types), list(outputs)
    kept = [new for at, node in enumerate(nodes) for new in walk.edits.get(at, [node])]
    renamed = [walk.renamed(node) for node in kept]
    outputs = [walk.last(o) for o in outputs]
    return needed(renamed, outputs), walk.types, outputs


def _sorts_rows(node: Node, types: Sequence[TensorType]) -> bool:
    call = Call(node, types)  # type: ignore[arg-type]
    (given,) = call.inputs
    return len(given.shape) == 1 and not given.dtype.is_floating_point and not call.args.get("descending")


class _Walk:
    """The nodes, and what becomes of them. `edits`: what stands in a node's place, by position. `same`: values that are
    the same as another one."""

    def __init__(self, nodes: Sequence[Node], types: Sequence[TensorType], outputs: Sequence[int]) -> None:
        self.nodes = nodes
        self.types = list(types)
        self.outputs = frozenset(outputs)
        self.edits: dict[int, list[Node]] = {}
        self.same: dict[int, int] = {}
        self.maker = {out: node for node in nodes for out in flat_ids(node.outs)}
        self.users: defaultdict[int, list[int]] = defaultdict(list)
        for at, node in enumerate(nodes):
            for id_ in {r.id for r in refs((node.args, node.kwargs))}:
                self.users[id_].append(at)

    def new(self, type_: TensorType) -> int:
        self.types.append(type_)
        return len(self.types) - 1

    def last(self, id_: int) -> int:
        while id_ in self.same:
            id_ = self.same[id_]
        return id_

    def renamed(self, node: Node) -> Node:
        if all(r.id not in self.same for r in refs((node.args, node.kwargs))):
            return node
        args, kwargs = map_args(
            (node.args, node.kwargs), lambda leaf: Ref(self.last(leaf.id)) if isinstance(leaf, Ref) else leaf
        )
        return replace(node, args=args, kwargs=kwargs)

    def is_zero(self, id_: int) -> bool:
        """Whether a value is nothing but zeros."""
        maker = self.maker.get(id_)
        return maker is not None and maker.op is aten.full.default and maker.args[1] == 0

    def is_alike(self, id_: int, dim: int) -> bool:
        """Whether all entries along a dim of a value are known to be the same."""
        maker = self.maker.get(id_)
        if maker is None or maker.op is not aten.expand.default:
            return maker is not None and maker.op is aten.full.default
        before, after = self.types[maker.args[0].id].shape, self.types[id_].shape
        at = dim - (len(after) - len(before))
        return at < 0 or before[at] == 1


class _NotUnderstood(Exception):
    """A use of sorted rows that is not known to treat each by itself."""


@dataclass
class _Found:
    """What is known of values that follow from a sort. rows: those whose rows lie in sorted order, with the dim that
    the rows are along. divided: places that sorted rows came from, as a position divided by so much. inverse: places
    that rows go to."""

    rows: dict[int, int] = field(default_factory=dict)
    divided: dict[int, int] = field(default_factory=dict)
    inverse: set[int] = field(default_factory=set)

    def __contains__(self, id_: int) -> bool:
        return id_ in self.rows or id_ in self.divided or id_ in self.inverse


class _Sorted:
    """One sort, and all that follows from it."""

    def __init__(self, walk: _Walk, at: int) -> None:
        node = walk.nodes[at]
        self._walk = walk
        self._at = at
        self._given = node.args[0].id
        self._sorted, order = node.outs
        self._n = walk.types[self._given].shape[0]
        self._found = _Found({self._sorted: 0}, {order: 1})
        self._edits: dict[int, list[Node]] = {at: []}
        self._same = {self._sorted: self._given}

    def rewrite(self) -> None:
        """Edits the walk, if every use of the sorted rows is understood."""
        users = self._walk.users
        waiting = [at for out in flat_ids(self._walk.nodes[self._at].outs) for at in users[out]]
        heapq.heapify(waiting)
        seen: set[int] = set()
        try:
            while waiting:
                at = heapq.heappop(waiting)
                if at in seen:
                    continue
                seen.add(at)
                self._follow(at)
                for out in flat_ids(self._walk.nodes[at].outs):
                    if out in self._found:
                        for user in users[out]:
                            heapq.heappush(waiting, user)
        except _NotUnderstood:
            return
        if any(out in self._found for out in self._walk.outputs):
            return
        self._walk.edits |= self._edits
        self._walk.same |= self._same

    def _follow(self, at: int) -> None:
        node = self._walk.nodes[at]
        special = _SPECIAL.get(node.op)
        if special is None or not special(self, at, node):
            self._row_by_row(node)

    # -- places

    def _divide(self, at: int, node: Node) -> bool:
        """Places divided by a number: of rows that are there several times, where the one is that they come from."""
        place, by = node.args[:2]
        by_1 = self._found.divided.get(place.id) == 1
        rounds_down = node.op is aten.floor_divide.default or node.kwargs.get("rounding_mode") == "floor"
        if not (by_1 and rounds_down and isinstance(by, int) and by > 0 and self._n % by == 0):
            return False
        self._found.divided[node.outs] = by
        return True

    def _invert(self, node: Node) -> bool:
        """An order written at the places that it names is where each row has gone to."""
        base, places, values = node.args[:3]
        maker = self._walk.maker.get(values.id)
        counts = maker is not None and maker.op is aten.arange.default and maker.args == (self._n,)
        if not counts or self._walk.types[base.id].shape != (self._n,) or places[0].id in self._found.inverse:
            return False
        self._found.inverse.add(node.outs)
        return True

    def _sort_back(self, at: int, node: Node) -> bool:
        """The order of an order is where each row has gone to."""
        call = Call(node, self._walk.types)  # type: ignore[arg-type]
        values, order = node.outs
        if self._found.divided.get(node.args[0].id) != 1 or call.args.get("descending") or self._walk.users[values]:
            return False
        self._found.inverse.add(order)
        return True

    # -- rows taken, and put back

    def _take(self, at: int, node: Node) -> bool:
        x, places = node.args
        place = self._place(places)
        if place is None:
            return False
        if place in self._found.inverse:  # rows come back to where they were
            self._expect(self._found.rows.get(x.id) == 0)
            self._replace(at, node.outs, x.id)
            return True
        self._expect(x.id not in self._found and x.id != place)
        by = self._found.divided[place]
        self._expect(self._walk.types[x.id].shape[0] * by == self._n)
        self._found.rows[node.outs] = 0
        if by == 1:
            self._replace(at, node.outs, x.id)
        else:
            self._edits[at] = self._repeated(node, x.id, by)
        return True

    def _put(self, at: int, node: Node) -> bool:
        """The backward of taking: what was taken several times is added up."""
        base, places, values = node.args[:3]
        adds = len(node.args) > 3 and node.args[3]
        place = self._place(places)
        if place is None:
            return False
        if place in self._found.divided and self._found.divided[place] == 1 and not adds and self._invert(node):
            return True
        types = self._walk.types
        self._expect(self._walk.is_zero(base.id) and types[base.id].dtype == types[values.id].dtype)
        if place in self._found.inverse:
            self._expect(values.id not in self._found and self._same_shape(values.id, node.outs))
            self._found.rows[node.outs] = 0
            self._replace(at, node.outs, values.id)
            return True
        by = self._found.divided[place]
        self._expect(self._found.rows.get(values.id) == 0 and types[node.outs].shape[0] * by == self._n)
        if by == 1:
            self._expect(self._same_shape(values.id, node.outs))
            self._replace(at, node.outs, values.id)
        else:
            self._expect(bool(adds))
            self._edits[at] = self._added_up(node, values.id, by)
        return True

    def _place(self, places: Any) -> int | None:
        """The places that an indexing goes by, if they are of sorted rows."""
        named = [p for p in places if p is not None]
        if len(named) != 1 or places[0] is None:
            return None
        id_: int = named[0].id
        return id_ if id_ in self._found.divided or id_ in self._found.inverse else None

    def _repeated(self, node: Node, x: int, times: int) -> list[Node]:
        """Every row of `x` so many times in a row."""
        n, *rest = self._walk.types[x].shape
        dtype = self._walk.types[x].dtype
        apart = self._walk.new(TensorType((n, 1, *rest), dtype))
        several = self._walk.new(TensorType((n, times, *rest), dtype))
        return [
            Node(aten.reshape.default, (Ref(x), (n, 1, *rest)), {}, apart, node.origin),
            Node(aten.expand.default, (Ref(apart), (n, times, *rest)), {}, several, node.origin),
            Node(aten.reshape.default, (Ref(several), (n * times, *rest)), {}, node.outs, node.origin),
        ]

    def _added_up(self, node: Node, x: int, times: int) -> list[Node]:
        """The sums of so many rows each."""
        n, *rest = self._walk.types[x].shape
        apart = self._walk.new(TensorType((n // times, times, *rest), self._walk.types[x].dtype))
        return [
            Node(aten.reshape.default, (Ref(x), (n // times, times, *rest)), {}, apart, node.origin),
            Node(aten.sum.dim_IntList, (Ref(apart), (1,)), {}, node.outs, node.origin),
        ]

    # -- products

    def _multiply(self, at: int, node: Node) -> bool:
        a, b, *others = node.args
        rows = self._found.rows
        self._expect(len(others) == 1 and not node.kwargs)
        types = self._walk.types
        ids = Ref(self._given)
        if rows.get(a.id) == 0 and b.id not in self._found and len(types[b.id].shape) == 3:
            self._expect(self._ends_experts(others[0], types[b.id].shape[0]))
            self._edits[at] = [replace(node, op=moai.rows_mm.default, args=(a, b, ids))]
            rows[node.outs] = 0
        else:
            self._expect(rows.get(a.id) == 1 and rows.get(b.id) == 0)
            experts = types[node.outs].shape[0]
            self._expect(self._ends_experts(others[0], experts))
            upright = self._walk.new(TensorType(tuple(reversed(types[a.id].shape)), types[a.id].dtype))
            self._edits[at] = [
                Node(aten.permute.default, (a, (1, 0)), {}, upright, node.origin),
                replace(node, op=moai.rows_outer.default, args=(Ref(upright), b, ids, experts)),
            ]
        return True

    def _ends_experts(self, ends: Ref, experts: int) -> bool:
        """Whether `ends` is where the rows of each of so many experts end: sums of how many rows each has."""
        sums = self._walk.maker.get(ends.id)
        if sums is None or sums.op is not aten.cumsum.default or sums.args[1] != 0:
            return False
        counted = self._walk.maker.get(sums.args[0].id)
        if counted is None or counted.op is not aten.index_add.default or counted.kwargs.get("alpha", 1) != 1:
            return False
        base, dim, which, much = counted.args
        if not self._walk.is_zero(base.id) or dim != 0 or self._walk.types[base.id].shape != (experts,):
            return False
        # What becomes of each of the numbers that an expert can have tells about all rows.
        every = torch.arange(experts, device="cpu")
        return torch.equal(self._of(which.id, every).long(), every) and bool((self._of(much.id, every) == 1).all())

    def _of(self, id_: int, every: torch.Tensor) -> torch.Tensor:
        """What a value would be if the sorted rows' experts were `every`."""
        if id_ == self._sorted:
            return every
        maker = self._walk.maker.get(id_)
        self._expect(maker is not None and (maker.op is aten._to_copy.default or torch.Tag.pointwise in maker.op.tags))
        assert maker is not None

        def filled(leaf: Any) -> Any:
            self._expect(not isinstance(leaf, Scalar))  # a number of each step's own
            return self._of(leaf.id, every) if isinstance(leaf, Ref) else leaf

        args, kwargs = map_args((maker.args, maker.kwargs), filled)
        found: torch.Tensor = maker.op(*args, **kwargs)
        return found

    def _count(self, at: int, node: Node) -> bool:
        """How many rows each expert has does not depend on their order."""
        base, dim, which, much = node.args
        rows = self._found.rows
        counts = dim == 0 and rows.get(which.id) == 0 and rows.get(much.id) == 0 and base.id not in self._found
        return counts and not self._walk.types[node.outs].dtype.is_floating_point

    # -- everything else

    def _row_by_row(self, node: Node) -> None:
        """A node that has a loop over the rows, and does nothing else with them."""
        rule = rule_of(node.op)
        call = Call(node, self._walk.types)  # type: ignore[arg-type]
        dims = None if rule is None else rule(call)
        if dims is None:
            raise _NotUnderstood
        rows = self._found.rows
        loops = set()
        for id_, factors in zip(call.input_ids, dims.inputs, strict=True):
            if id_ in rows:
                loops.add(factors[rows[id_]])
            else:
                self._expect(id_ not in self._found)
        self._expect(len(loops) == 1)
        (loop,) = loops
        self._expect(loop is not None and factors_of(loop) == [loop] and loop not in dims.starts.values())
        for id_, factors in zip(call.input_ids, dims.inputs, strict=True):
            along = _along(factors, loop)
            alike = all(self._walk.is_alike(id_, d) for d in along)
            self._expect(along == [rows[id_]] if id_ in rows else alike)
        for out, factors in zip(flat_ids(node.outs), dims.outputs, strict=True):
            along = _along(factors, loop)
            self._expect(along[1:] == [] and (bool(along) or loop in dims.summed or loop in dims.maxed))
            if along:
                rows[out] = along[0]

    def _same_shape(self, a: int, b: int) -> bool:
        return self._walk.types[a] == self._walk.types[b]

    def _replace(self, at: int, out: int, by: int) -> None:
        self._edits[at] = []
        self._same[out] = by

    def _expect(self, holds: bool) -> None:
        if not holds:
            raise _NotUnderstood


def _along(factors: Sequence[Any], loop: Any) -> list[int]:
    """The dims that run over `loop`, alone or with others."""
    return [d for d, entry in enumerate(factors) if loop in factors_of(entry)]


# They return whether they could do anything with the node.
_SPECIAL: Mapping[torch._ops.OpOverload, Callable[[_Sorted, int, Node], bool]] = {
    **dict.fromkeys(_WHOLE_QUOTIENTS, _Sorted._divide),
    **dict.fromkeys(_SORTS, _Sorted._sort_back),
    aten.index.Tensor: _Sorted._take,
    aten.index_put.default: _Sorted._put,
    aten.index_add.default: _Sorted._count,
    aten._grouped_mm.default: _Sorted._multiply,
}
