"""Placement: every value of a graph is given its place on the devices, and every node becomes a local instruction.

In: canonical nodes, the placements of the inputs. Out: straight-line instructions over local parts, with each
change of placement spelled out. Decisions are made here, in one forward walk:

- A node runs split where its rule allows it and its inputs already lie that way; the split that moves fewest bytes
  wins.
- A whole tensor that meets a split one takes its slice, which costs nothing. Of two that are split differently one is
  gathered.
- A Partial waits behind linear operators and is summed once, when somebody needs its value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch

from moai.graph.placement import Partial, Placement, Replicate, Shard
from moai.graph.rules import rule_of
from moai.graph.rules.dims import (
    PARTIAL,
    REPLICATE,
    Call,
    Dims,
    Split,
    argument_names,
    choose,
    output_placement,
    split_for,
)
from moai.graph.rules.indexing import INTO_ZEROS
from moai.graph.rules.linear import adds_a_number, keeps_partial
from moai.graph.rules.pointwise import broadcast
from moai.graph.step_graph import Node, Origin, Ref, flat_ids, map_args
from moai.lower.decompose import decompose
from moai.lower.program import Instruction
from moai.lower.values import Values, offsets, per_rank

aten = torch.ops.aten

_FOREACH_REDUCTIONS = frozenset({aten._foreach_norm.Scalar, aten._foreach_max.default})


class Placer:
    """Turns nodes into `code`, one at a time. `notes` says which operators had to be computed whole."""

    def __init__(self, values: Values, n_devices: int):
        self.code: list[Instruction] = []
        self.notes: list[str] = []
        self._values = values
        self._n = n_devices
        self._elsewhere: dict[tuple[int, Placement], int] = {}  # (value, placement) -> the value placed so
        self._constants: dict[int, Node] = {}  # values made from numbers alone, by their node
        self._noted: set[str] = set()

    def add(self, node: Node) -> None:
        """Emit `node`, whose inputs have been placed."""
        call = Call(node, self._values.types)
        self._remember(call)
        if self._n == 1:
            return self._emit(node, call.input_ids, [REPLICATE] * len(call.outputs))
        self._refuse_private_randomness(call)
        rewritten = decompose(call, self._placements(call), self._values)
        if rewritten is not None:
            for part in rewritten:
                self.add(part)
            return None
        if node.op.name().startswith("aten::_foreach_"):
            lanes = _lanes(node)
            if lanes is not None:
                return self._add_lanes(call, lanes)
        return self._add_whole(call)

    def placed(self, id_: int, placement: Placement, origin: Origin) -> int:
        """Value `id_` in `placement`; emitted at most once."""
        if self._values.placement(id_) == placement:
            return id_
        key = (id_, placement)
        if key not in self._elsewhere:
            self._elsewhere[key] = self._moved(id_, placement, origin)
        return self._elsewhere[key]

    def settled(self, id_: int) -> int:
        """Value `id_` as its sum where that has been taken already, else as it is."""
        return self._elsewhere.get((id_, REPLICATE), id_) if isinstance(self._at(id_), Partial) else id_

    # -- one node

    def _add_whole(self, call: Call) -> None:
        """A node that is split, if at all, in one way."""
        node = call.node
        ids = [self.settled(i) for i in call.input_ids]
        if self._stays_partial(call, ids):
            return self._emit(node, ids, [PARTIAL] * len(call.outputs))
        ids = [self._summed(i, node.origin) for i in ids]
        placements = [self._at(i) for i in ids]
        dims = self._dims(call)
        split = None if dims is None else choose(dims, call.inputs, call.outputs, placements)
        if dims is None or split is None:
            if any(isinstance(p, Shard) for p in placements):
                self._note(call)
            ids = [self.placed(i, REPLICATE, node.origin) for i in ids]
            return self._emit(node, ids, [REPLICATE] * len(call.outputs))
        ids = [self.placed(i, split.placement(f), node.origin) for i, f in zip(ids, dims.inputs, strict=True)]
        outputs = [output_placement(f, split) for f in dims.outputs]
        return self._emit(_localised(node, dims, split), ids, outputs)

    def _dims(self, call: Call) -> Dims | None:
        into_zeros = INTO_ZEROS.get(call.op)
        rule = into_zeros if into_zeros and self._values.is_zero(call["self"].id) else rule_of(call.op)
        return None if rule is None else rule(call)

    def _stays_partial(self, call: Call, ids: Sequence[int]) -> bool:
        partial = [isinstance(self._at(i), Partial) for i in ids]
        return (
            any(partial)
            and not any(isinstance(self._at(i), Shard) for i in ids)
            and not adds_a_number(call)
            and keeps_partial(call.op, call.inputs, call.outputs, partial)
        )

    def _summed(self, id_: int, origin: Origin) -> int:
        return self.placed(id_, REPLICATE, origin) if isinstance(self._at(id_), Partial) else id_

    # -- foreach: the elements of the lists are independent of each other

    def _add_lanes(self, call: Call, lanes: tuple[list[int], list[list[int]]]) -> None:
        """`lanes`: positions in `call.inputs` of tensors that every element shares, and of each element's own."""
        node = call.node
        shared, each = lanes
        ids = [self.settled(i) for i in call.input_ids]
        for p in shared:
            ids[p] = self.placed(ids[p], REPLICATE, node.origin)
        outputs: list[Placement] = []
        for k, positions in enumerate(each):
            lane, placement = self._lane(call, [ids[p] for p in positions], [ids[p] for p in shared], k)
            for p, id_ in zip(positions, lane, strict=True):
                ids[p] = id_
            outputs.append(placement)
        self._emit(node, ids, outputs)

    def _lane(self, call: Call, own: list[int], shared: list[int], k: int) -> tuple[list[int], Placement]:
        """How one element's tensors are to lie, and where its result does."""
        origin, out = call.node.origin, call.outputs[k]
        partial = [isinstance(self._at(i), Partial) for i in (*own, *shared)]
        split = any(isinstance(self._at(i), Shard) for i in own)
        types = [self._values.type(i) for i in (*own, *shared)]
        if any(partial) and not split and keeps_partial(call.op, types, [out], partial):
            return own, PARTIAL
        own = [self._summed(i, origin) for i in own]
        if split and call.op not in _FOREACH_REDUCTIONS:
            dims = Dims(tuple(broadcast(t, out) for t in types[: len(own)]), (tuple(range(len(out.shape))),))
            chosen = choose(dims, types[: len(own)], [out], [self._at(i) for i in own])
            if chosen is not None:
                lane = [self.placed(i, chosen.placement(f), origin) for i, f in zip(own, dims.inputs, strict=True)]
                return lane, output_placement(dims.outputs[0], chosen)
        return [self.placed(i, REPLICATE, origin) for i in own], REPLICATE

    # -- changing a value's placement

    def _moved(self, id_: int, placement: Placement, origin: Origin) -> int:
        now = self._at(id_)
        if isinstance(now, Replicate) and isinstance(placement, Shard):
            made = self._made_in_part(id_, placement)
            return self._slice(id_, placement, origin) if made is None else made
        if isinstance(now, Shard) and isinstance(placement, Replicate):
            return self._collective("all_gather", (Ref(id_), now.dim, now.sizes), id_, origin)
        if isinstance(now, Partial) and isinstance(placement, Replicate):
            return self._collective("all_reduce", (Ref(id_),), id_, origin)
        assert isinstance(placement, Shard), f"%{id_} is asked to become {placement} from {now}"
        return self.placed(self.placed(id_, REPLICATE, origin), placement, origin)

    def _collective(self, name: str, args: tuple[Any, ...], id_: int, origin: Origin) -> int:
        out = self._values.new(self._values.type(id_), REPLICATE)
        self.code.append(Instruction(name, args, {}, out, (), (self._values.local_shape(out),), origin.where))
        return out

    def _slice(self, id_: int, shard: Shard, origin: Origin) -> int:
        out = self._values.new(self._values.type(id_), shard)
        begin, end = offsets(shard.sizes), offsets(shard.sizes, ends=True)
        args = (Ref(id_), shard.dim, per_rank(begin), per_rank(end))
        shapes = (self._values.local_shape(out),)
        self.code.append(Instruction(str(aten.slice.Tensor), args, {}, out, (), shapes, origin.where))
        return out

    def _made_in_part(self, id_: int, shard: Shard) -> int | None:
        """A value made from numbers alone: every device makes its own part, rather than a slice of the whole."""
        node = self._constants.get(id_)
        if node is None or not isinstance(node.outs, int):
            return None
        call = Call(node, self._values.types)
        dims = self._dims(call)
        split = None if dims is None else split_for(dims.outputs[0], shard)
        if dims is None or split is None:
            return None
        ids = [
            self.placed(i, split.placement(f), node.origin) for i, f in zip(call.input_ids, dims.inputs, strict=True)
        ]
        out = self._values.new(self._values.type(id_))
        local = _localised(node, dims, split)
        self._emit(Node(local.op, local.args, local.kwargs, out, node.origin), ids, [shard])
        return out

    def _remember(self, call: Call) -> None:
        """Note what is made from numbers alone, and what is zero."""
        node = call.node
        if node.op is aten.full.default and node.args[1] == 0:
            self._values.mark_zero(node.outs)
        if all(i in self._constants for i in call.input_ids):
            self._constants.update((i, node) for i in flat_ids(node.outs))

    # -- emission

    def _emit(self, node: Node, ids: Sequence[int], outputs: Sequence[Placement]) -> None:
        """Append `node` with `ids` as its tensor arguments, in order."""
        outs = list(flat_ids(node.outs))
        for out, placement in zip(outs, outputs, strict=True):
            self._values.place(out, placement)
        replaced = iter(ids)
        args, kwargs = map_args(
            (node.args, node.kwargs), lambda leaf: Ref(next(replaced)) if isinstance(leaf, Ref) else leaf
        )
        shapes = tuple(self._values.local_shape(o) for o in outs)
        self.code.append(Instruction(str(node.op), args, kwargs, node.outs, (), shapes, node.origin.where))

    def _at(self, id_: int) -> Placement:
        return self._values.placement(id_)

    def _placements(self, call: Call) -> list[Placement]:
        return [self._at(i) for i in call.input_ids]

    def _note(self, call: Call) -> None:
        """Say once for each operator that it is computed whole on every device."""
        name = str(call.op)
        if rule_of(call.op) is None and name not in self._noted:
            self._noted.add(name)
            where = f" ({call.node.origin.where})" if call.node.origin.where else ""
            self.notes.append(f"{name} has no sharding rule: every device computes the whole of it{where}")

    def _refuse_private_randomness(self, call: Call) -> None:
        if torch.Tag.nondeterministic_seeded in call.op.tags and call.args.get("dropout_p") != 0.0:
            where = call.node.origin.where or "unknown line"
            raise RuntimeError(
                f"{call.op} ({where}) draws random numbers from a device's own generator, which no two devices share; "
                "draw them with torch.rand, torch.randn, torch.bernoulli or F.dropout, or use one device"
            )


def _lanes(node: Node) -> tuple[list[int], list[list[int]]] | None:
    """Positions, among a foreach node's tensors, of those shared by all elements and of each element's own."""
    outs = node.outs if isinstance(node.outs, tuple) else ()
    shared: list[int] = []
    each: list[list[int]] = [[] for _ in outs]
    at = 0
    for arg in (*node.args, *node.kwargs.values()):
        tensors = [arg] if isinstance(arg, Ref) else list(_only_refs(arg))
        if isinstance(arg, Ref):
            shared.append(at)
        elif len(tensors) == len(outs):
            for k in range(len(outs)):
                each[k].append(at + k)
        elif tensors:
            return None
        at += len(tensors)
    return (shared, each) if outs and all(isinstance(o, int) for o in outs) else None


def _only_refs(arg: Any) -> Iterator[Ref]:
    if isinstance(arg, (tuple, list)):
        yield from (a for a in arg if isinstance(a, Ref))


def _localised(node: Node, dims: Dims, split: Split) -> Node:
    """`node` with the arguments that repeat lengths, or say where a part begins, following the split."""
    if not dims.sizes and not dims.starts:
        return node
    args = list(node.args)
    kwargs = dict(node.kwargs)
    names = argument_names(node.op)

    def change(name: str, new: Any) -> None:
        if name in kwargs:
            kwargs[name] = new(kwargs[name])
        else:
            args[names.index(name)] = new(args[names.index(name)])

    def lengths(entries: tuple[Any, ...]) -> Any:
        local = [split.lengths(e) for e in entries]

        def one(value: Any, sizes: tuple[int, ...] | None) -> Any:
            return value if sizes is None else per_rank(sizes)

        def new(value: Any) -> Any:
            if isinstance(value, (tuple, list)):
                return tuple(one(v, sizes) for v, sizes in zip(value, (*local, *[None] * len(value)), strict=False))
            return one(value, local[0])

        return new

    for name, entries in dims.sizes.items():
        change(name, lengths(entries))
    for name, factor in dims.starts.items():
        if factor == split.factor:
            change(name, lambda start: per_rank(tuple(start + o for o in offsets(split.sizes))))
    return Node(node.op, tuple(args), kwargs, node.outs, node.origin)
