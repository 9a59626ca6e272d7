"""Placement: every value of a graph is given its place on the mesh, and every node becomes a local instruction.

In: canonical nodes, the placements of the inputs, and wishes for what is summed. Out: straight-line instructions over
local parts, with each change of placement spelled out (`emission`). Decisions are made here, in one forward walk:

- A node runs split where its rule allows it and its inputs already lie that way; over each axis the split that moves
  fewest bytes wins.
- A whole tensor that meets a split one takes its slice, which costs nothing. Of two that are split differently one is
  gathered.
- What is left in terms waits behind linear operators and is summed once, when somebody needs its value: to the part
  that is wished for, if any, else whole.
- A sharded state is gathered where the layers use it, and stays sharded in the optimizer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch

from moai.graph.placement import REPLICATE, TIME, Placement, Shard, split_evenly
from moai.graph.rules import rule_of
from moai.graph.rules.dims import (
    Call,
    Dims,
    Split,
    choose,
    left_maximal,
    left_partial,
    legal,
    placement_of,
    split_for,
)
from moai.graph.rules.linear import adds_a_number, keeps_partial
from moai.graph.step_graph import Node, Origin, Ref, TensorType, flat_ids
from moai.lower.decompose import decompose
from moai.lower.dim_classes import PRODUCTS
from moai.lower.emission import CASTS, Emission
from moai.lower.lanes import Lane, lanes_of
from moai.lower.localise import localised
from moai.lower.operators import is_view
from moai.lower.program import Instruction
from moai.lower.values import Values, per_rank
from moai.plan.plan import Plan

aten = torch.ops.aten

_NORMS = frozenset({aten._foreach_norm.Scalar})
_AFTER_SUM = 2  # of a norm taken apart: the root, and the cast to the dtype that was asked for


class Placer:
    """Says of one node after the other how it runs, and writes it to `emission`. `notes` says which operators had to be
    computed whole.

    stored: states that are spread over the plan's `shard_axis`. wishes: the shard that a value should become where it
    is summed over that shard's axis. gradients: shards over "tp" of values that meet a split weight in the optimizer.
    uses: how many nodes read a value. trained: the weights among the inputs that the step updates.
    """

    def __init__(
        self,
        values: Values,
        plan: Plan,
        stored: set[int],
        wishes: Mapping[int, tuple[Shard, ...]],
        gradients: Mapping[int, tuple[Shard, ...]],
        uses: Mapping[int, int],
        trained: Collection[int],
    ):
        self.notes: list[str] = []
        self._values = values
        self._plan = plan
        self._wishes = wishes
        self._gradients = gradients
        self._uses = uses
        self._trained = set(trained)  # and what is a view of them, or they in another precision
        # Where no device is to hold weights as a whole, none adds up whole gradients either.
        self._in_passes = frozenset((plan.shard_axis,) if plan.distribute_low_prec_param else ())
        self._batch_axes = tuple(a for a in plan.batch_axes if a in values.mesh.sizes)
        self.emission = Emission(values, stored, self._batch_axes, self._in_passes)
        self._sums: dict[int, int] = {}  # values left in terms -> their sum
        self._samples: set[int] = set()  # inputs that are split along the batch, if at all
        self._begun: dict[int, int] = {}  # inputs -> what the nodes use in their stead
        self._noted: set[str] = set()

    def begin(self, id_: int, wanted: Placement) -> None:
        """Have the nodes use input `id_`, which has been placed, in placement `wanted`."""
        if id_ not in self.emission.stored:
            self._samples.add(id_)
        if self._values.placement(id_) != wanted:
            self._begun[id_] = self.emission.placed(id_, wanted, Origin("forward"))

    def add(self, node: Node) -> None:
        """Emit `node`, whose inputs have been placed."""
        call = Call(node, self._values.types)
        self._remember(call)
        if not self._values.mesh.axes:
            return self.emission.emit(node, call.input_ids, [REPLICATE] * len(call.outputs))
        self._refuse_private_randomness(call)
        lanes = lanes_of(node)
        if lanes is not None:
            return self._add_lanes(call, lanes)
        return self._add_whole(call)

    def settled(self, id_: int) -> int:
        """Value `id_` as its sum where that has been taken already, else as it is."""
        id_ = self._begun.get(id_, id_)
        return self._sums.get(id_, id_)

    # -- what a node is given

    def _used(self, id_: int, node: Node) -> int:
        """The value that stands for `id_` in `node`: gathered, if it is a sharded state, or one micro-batch of it."""
        id_ = self.settled(id_)
        if node.origin.phase == "optimizer":
            return self._begun_in_part(id_, node.origin)
        if id_ in self.emission.stored:
            return id_ if node.op in CASTS else self._gathered(id_, node.origin)
        if TIME in self._batch_axes and id_ in self._samples:
            return self._in_micro_batches(id_, node.origin)
        return id_

    def _begun_in_part(self, id_: int, origin: Origin) -> int:
        """The zeros that a first step's new states begin with, as the parts that these will be."""
        shards = self._wishes.get(id_) or self._gradients.get(id_, ())
        if not self.emission.is_constant(id_) or not shards or self._at(id_) != REPLICATE:
            return id_
        return self.emission.placed(id_, Placement(shards), origin)

    def _gathered(self, id_: int, origin: Origin) -> int:
        """A state as the layers use it; where it is dropped after use, the backward gathers it anew."""
        now = self._at(id_)
        whole = replace(now, shards=tuple(s for s in now.shards if self._plan.shard_axis not in s.axes))
        return self.emission.placed(id_, whole, origin, origin.phase if self._plan.distribute_low_prec_param else None)

    def _in_micro_batches(self, id_: int, origin: Origin) -> int:
        now = self._at(id_)
        outer = self._batch_axes[:-1]
        for shard in now.shards:
            if shard.axes == outer and outer:
                return self.emission.placed(id_, _refined(now, shard, self._values.mesh.steps), origin)
        return id_

    def _summed(self, id_: int, keep: Sequence[str], origin: Origin) -> int:
        """Value `id_` summed over all axes that it is left in terms over, but for `keep`."""
        now = self._at(id_)
        open_ = [a for a in now.partial if a not in keep]
        if not open_:
            return id_
        taken = {a for s in now.shards for a in s.axes}
        split = {s.dim for s in now.shards}
        shards = list(now.shards)
        for wish in self._wishes.get(id_, ()):
            if set(wish.axes) <= set(open_) - taken and wish.dim not in split:
                shards.append(wish)
        wanted = Placement(tuple(sorted(shards, key=lambda s: s.dim)), tuple(a for a in now.partial if a in keep))
        found = self.emission.placed(id_, wanted, origin)
        if not wanted.partial:
            self._sums[id_] = found
        return found

    # -- one node

    def _add_whole(self, call: Call) -> None:
        """A node whose tensors are split together, if at all."""
        node, origin = call.node, call.node.origin
        ids = [self._used(i, node) for i in call.input_ids]
        if call.op is aten.add.Tensor:
            ids = self._with_bias_in_terms(call, ids)
        stays = self._stays_partial(call.op, call.inputs, call.outputs, ids, adds_a_number(call))
        ids = [self._summed(i, stays, origin) for i in ids]
        placements = [self._at(i) for i in ids]
        rewritten = decompose(call, placements, self._values)
        if rewritten is not None:
            for part in rewritten:
                self.add(part)
            return None
        dims = self.emission.dims(call)
        lying = self._weights_first(call, placements)
        splits = () if dims is None else choose(dims, call.inputs, call.outputs, lying)
        if dims is not None:
            splits = self._to_their_shards(call, dims, splits)
        if dims is None or not splits:
            if any(p.shards for p in placements):
                self._note(call)
            ids = [self.emission.placed(i, Placement((), self._at(i).partial), origin) for i in ids]
            return self.emission.emit(node, ids, [Placement((), stays)] * len(call.outputs))
        ids = [
            self.emission.placed(i, placement_of(f, splits, self._at(i).partial), origin)
            for i, f in zip(ids, dims.inputs, strict=True)
        ]
        self._emit_split(localised(node, dims, splits), ids, dims, splits, stays)
        return None

    def _with_bias_in_terms(self, call: Call, ids: list[int]) -> list[int]:
        """A small weight that is added to terms over "tp" becomes a term itself, so that they can wait on. Anything
        else that is added may be infinite, as masks are, and no multiple of that is nothing."""
        partial = ["tp" in self._at(i).partial for i in ids]
        if len(ids) != 2 or partial[0] == partial[1] or call.args.get("alpha", 1) != 1:
            return ids
        whole = partial.index(False)
        if call.input_ids[whole] not in self._trained:
            return ids
        id_, other = ids[whole], ids[1 - whole]
        if "tp" in self._at(id_).split_axes or self._values.type(id_).numel * 8 > self._values.type(other).numel:
            return ids
        return [*ids[:whole], self._as_term(id_, call.node.origin), *ids[whole + 1 :]]

    def _as_term(self, id_: int, origin: Origin) -> int:
        """Value `id_` as a sum over "tp" of itself and zeros."""
        now = self._at(id_)
        once = per_rank(("tp",), (1, *[0] * (self._values.mesh.sizes["tp"] - 1)))
        out = self._values.new(self._values.type(id_), replace(now, partial=self._in_order({*now.partial, "tp"})))
        shapes = (self._values.local_shape(out),)
        self.emission.append(Instruction(str(aten.mul.Scalar), (Ref(id_), once), {}, out, (), shapes, origin.where))
        return out

    def _weights_first(self, call: Call, placements: list[Placement]) -> list[Placement]:
        """How the inputs may go on lying: a sequence is gathered where it is flattened, and where parts of it meet
        parts of heads or of a layer's width in a product."""
        flattens = call.op is aten.reshape.default and len(call.outputs[0].shape) < len(call.inputs[0].shape)
        if not flattens and call.op not in PRODUCTS:
            return placements
        over_tp = [p.shard_of("tp") for p in placements]
        along = [s is not None and s in self._wishes.get(i, ()) for i, s in zip(call.input_ids, over_tp, strict=True)]
        if not flattens and all(s is None or a for s, a in zip(over_tp, along, strict=True)):
            return placements
        return [
            replace(p, shards=tuple(s for s in p.shards if s != part)) if a else p
            for p, part, a in zip(placements, over_tp, along, strict=True)
        ]

    def _to_their_shards(self, call: Call, dims: Dims, splits: tuple[Split, ...]) -> tuple[Split, ...]:
        """Where a gradient would be left in terms over "tp" although its weight is split over it: the gradient's part
        is computed instead, from what was split otherwise."""
        for split in splits:
            if split.axes == ("tp",) and split.factor in dims.summed:
                for out, factors in zip(flat_ids(call.node.outs), dims.outputs, strict=True):
                    for wish in self._gradients.get(out, ()):
                        own = split_for(factors, wish)
                        if own is not None and legal(dims, call.outputs, own):
                            return tuple(own if s is split else s for s in splits)
        return splits

    def _emit_split(
        self, node: Node, ids: Sequence[int], dims: Dims, splits: tuple[Split, ...], stays: tuple[str, ...]
    ) -> None:
        outputs = [
            placement_of(f, splits, self._in_order({*stays, *left_partial(dims, f, splits)})) for f in dims.outputs
        ]
        maximal = [left_maximal(dims, f, splits) for f in dims.outputs]
        if any(maximal):
            self._emit_maximum(node, ids, outputs[0], maximal[0])
        else:
            self.emission.emit(node, ids, outputs)

    def _emit_maximum(self, node: Node, ids: Sequence[int], placement: Placement, axes: tuple[str, ...]) -> None:
        """The maximum over each device's part, and then over devices."""
        assert TIME not in axes, "the batch is not maximised over in parts"
        values = self._values
        own = values.new(values.type(node.outs))
        self.emission.emit(replace(node, outs=own), ids, [placement])
        values.place(node.outs, placement)
        shapes = (values.local_shape(own),)
        args = (Ref(own), self._in_order(set(axes)), "max")
        self.emission.append(Instruction("all_reduce", args, {}, node.outs, (), shapes, node.origin.where))

    def _stays_partial(
        self,
        op: torch._ops.OpOverload,
        inputs: Sequence[TensorType],
        outputs: Sequence[TensorType],
        ids: Sequence[int],
        adds_a_number: bool = False,
    ) -> tuple[str, ...]:
        """The axes over which the operator may be applied to every term."""
        placements = [self._at(i) for i in ids]
        axes = {a for p in placements for a in p.partial}
        if not axes or adds_a_number:
            return ()
        split = {a for p in placements for a in p.split_axes}
        if "tp" in axes and any("tp" in p.partial and self._uses[i] > 1 for i, p in zip(ids, placements, strict=True)):
            axes.discard("tp")  # several operators would each be followed by a sum
        return self._in_order(
            {a for a in axes - split if keeps_partial(op, inputs, outputs, [a in p.partial for p in placements])}
        )

    def _at(self, id_: int) -> Placement:
        return self._values.placement(id_)

    def _in_order(self, axes: set[str]) -> tuple[str, ...]:
        return tuple(a for a, _ in self._values.mesh.axes if a in axes) if axes else ()

    # -- lists of tensors whose elements are independent of each other

    def _add_lanes(self, call: Call, lanes: Sequence[Lane]) -> None:
        node, origin = call.node, call.node.origin
        ids = [self._used(i, node) for i in call.input_ids]
        shared = set(range(len(ids))) - {p for lane in lanes for p in lane.inputs}
        for p in shared:
            ids[p] = self.emission.placed(self._summed(ids[p], (), origin), REPLICATE, origin)
        outputs: list[Placement] = [REPLICATE] * len(call.outputs)
        if call.op in _NORMS:
            ids = [self._summed(i, (), origin) for i in ids]
            if any(self._at(i).shards for i in ids):
                self._add_norms(node, ids)
                return
        for lane in lanes:
            own = self._lane(call, lane, [ids[p] for p in lane.inputs], [ids[p] for p in shared], outputs)
            for p, id_ in zip(lane.inputs, own, strict=True):
                ids[p] = id_
        if call.op.name().startswith("aten::_fused_"):
            ids = [self.emission.dense(i, origin) for i in ids]
        self.emission.emit(node, ids, outputs)

    def _lane(self, call: Call, lane: Lane, own: list[int], shared: list[int], outputs: list[Placement]) -> list[int]:
        """How one element's tensors are to lie; notes in `outputs` where its results do."""
        origin = call.node.origin
        types = [self._values.type(i) for i in own]
        results = [call.outputs[k] for k in lane.outputs]
        both = [*own, *shared]
        stays = self._stays_partial(call.op, [self._values.type(i) for i in both], results, both)
        if TIME in stays:  # a list is either of one micro-batch or of all
            stays = tuple(a for a in stays if a != TIME and a not in self._in_passes)
        own = [self._summed(i, stays, origin) for i in own]
        dims = lane.dims(types, results)
        splits = () if dims is None else choose(dims, types, results, [self._at(i) for i in own])
        if dims is None or not splits:
            own = [self.emission.placed(i, Placement((), self._at(i).partial), origin) for i in own]
            for k in lane.outputs:
                outputs[k] = Placement((), stays)
            return own
        for k, factors in zip(lane.outputs, dims.outputs, strict=True):
            outputs[k] = placement_of(factors, splits, stays)
        return [
            self.emission.placed(i, placement_of(f, splits, self._at(i).partial), origin)
            for i, f in zip(own, dims.inputs, strict=True)
        ]

    def _add_norms(self, node: Node, ids: Sequence[int]) -> None:
        """Norms of tensors some of which lie in parts, one by one: first all sums, so that devices can exchange them
        together, then what is made of them."""
        order = node.args[1] if len(node.args) > 1 else 2
        parts = []
        for id_, out in zip(ids, node.outs, strict=True):
            kwargs = {"dtype": node.kwargs.get("dtype")}
            norm = Node(aten.linalg_vector_norm.default, (Ref(id_), order), kwargs, out, node.origin)
            parts.append(decompose(Call(norm, self._values.types), [self._at(id_)], self._values) or [norm])
        for part in parts:
            for step in part[:-_AFTER_SUM]:
                self.add(step)
        for part in parts:
            for step in part[-_AFTER_SUM:]:
                self.add(step)

    # -- what is known and said of nodes

    def _remember(self, call: Call) -> None:
        """Note what is made from numbers alone, what is zero, and what is a weight as it is."""
        node = call.node
        if (node.op in CASTS or is_view(str(node.op))) and self._trained.issuperset(call.input_ids):
            self._trained.update(flat_ids(node.outs))
        self.emission.remember(call)

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


def _refined(now: Placement, shard: Shard, steps: int) -> Placement:
    """`now` with `shard`, over the outer batch axes, split further into `steps` micro-batches."""
    sizes = tuple(part for size in shard.sizes for part in split_evenly(size, steps))
    fine = Shard(shard.dim, (*shard.axes, TIME), sizes, shard.blocks)
    return replace(now, shards=tuple(fine if s is shard else s for s in now.shards))
