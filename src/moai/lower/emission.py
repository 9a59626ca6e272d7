"""Local instructions as they are written down.

In: nodes, how they are to run, and where values are wanted. Out: `Emission.code`, in which each value is brought to
another placement at most once. What is made from numbers alone is made there in part, rather than cut from the whole.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import torch

from moai.graph.placement import REPLICATE, Placement
from moai.graph.rules import rule_of
from moai.graph.rules.dims import Call, Dims, meet, placement_of, split_for
from moai.graph.rules.indexing import INTO_ZEROS
from moai.graph.rules.views import reshape_inside
from moai.graph.step_graph import Node, Origin, Phase, Ref, flat_ids, map_args
from moai.lower.localise import localised
from moai.lower.moving import moved, next_placement
from moai.lower.operators import WALKED, is_view
from moai.lower.program import Instruction
from moai.lower.values import Values

aten = torch.ops.aten

CASTS = frozenset({aten._to_copy.default})


class Emission:
    """`stored`: states that are spread over devices, and casts of them. `remade`: values to be made again in each pass
    of the loop over micro-batches. `in_passes`: axes over which sums are taken in each pass."""

    def __init__(self, values: Values, stored: set[int], batch_axes: Collection[str], in_passes: Collection[str]):
        self.code: list[Instruction] = []
        self.remade: set[int] = set()
        self.stored = stored
        self._values = values
        self._batch_axes = frozenset(batch_axes)
        self._in_passes = frozenset(in_passes)
        # (value, placement, use) -> the value so placed
        self._elsewhere: dict[tuple[int, Placement, Hashable], int] = {}
        self._constants: dict[int, Node] = {}  # values made from numbers alone, by their node
        self._strided: set[int] = set()  # views, whose entries may lie apart
        self._phases: dict[int, Phase] = {}  # of what nodes make

    def _at(self, id_: int) -> Placement:
        return self._values.placement(id_)

    def is_constant(self, id_: int) -> bool:
        """Whether a value is made from numbers alone."""
        return id_ in self._constants

    def remember(self, call: Call) -> None:
        """Note what is made from numbers alone, and what is zero."""
        node = call.node
        if node.op is aten.full.default and node.args[1] == 0:
            self._values.mark_zero(node.outs)
        if all(i in self._constants for i in call.input_ids):
            self._constants.update((i, node) for i in flat_ids(node.outs))

    def dims(self, call: Call) -> Dims | None:
        """The loops that the tensors' dims run over, by the operator's rule; None if it has none."""
        if call.op is aten.reshape.default:
            return reshape_inside(call, self._inside)
        into_zeros = INTO_ZEROS.get(call.op)
        rule = into_zeros if into_zeros and self._values.is_zero(call["self"].id) else rule_of(call.op)
        return None if rule is None else rule(call)

    def _inside(self, id_: int, dim: int) -> bool:
        """Whether a reshape is to be split over an inner loop of the dim: where tensor parallelism wants it, where the
        value lies so already, and where samples are not the first dim."""
        if self._values.is_split_inside(id_, dim):
            return True
        for shard in self._values.shards(id_):
            if shard.dim == dim:
                return shard.blocks > 1 or (dim > 0 and set(shard.axes) <= self._batch_axes)
        return False

    # -- values elsewhere

    def placed(self, id_: int, wanted: Placement, origin: Origin, use: Hashable = None) -> int:
        """Value `id_` in placement `wanted`; emitted at most once for each `use`."""
        if self._at(id_) == wanted:
            return id_
        made = self._made_in_part(id_, wanted)
        found = id_
        while made is None and self._at(found) != wanted:
            step = next_placement(self._at(found), wanted, self._values.mesh, self._in_passes)
            key = (id_, step, use)
            if key not in self._elsewhere:
                self._elsewhere[key], code = moved(self._values, found, step, origin.where)
                for instruction in code:
                    self.append(instruction)
                if use is not None:
                    self.remade.add(self._elsewhere[key])
            found = self._elsewhere[key]
        return found if made is None else made

    def _made_in_part(self, id_: int, wanted: Placement) -> int | None:
        """A value made from numbers alone: every device makes its own part, rather than a slice of the whole."""
        key = (id_, wanted, None)
        node = self._constants.get(id_)
        if key in self._elsewhere or node is None or self._at(id_) != REPLICATE or not isinstance(node.outs, int):
            return self._elsewhere.get(key)
        call = Call(node, self._values.types)
        dims = self.dims(call)
        if dims is None:
            return None
        splits = tuple(split_for(dims.outputs[0], s) for s in wanted.shards)
        if any(s is None or (s.blocks > 1 and dims.starts) for s in splits):
            return None
        chosen = tuple(s for s in splits if s is not None)
        if meet(dims, chosen):
            return None
        ids = [
            self.placed(i, placement_of(f, chosen), node.origin)
            for i, f in zip(call.input_ids, dims.inputs, strict=True)
        ]
        out = self._elsewhere[key] = self._values.new(self._values.type(id_))
        local = localised(node, dims, chosen)
        self.emit(Node(local.op, local.args, local.kwargs, out, node.origin), ids, [wanted])
        return out

    # -- instructions

    def emit(self, node: Node, ids: Sequence[int], outputs: Sequence[Placement]) -> None:
        """Append `node` with `ids` as its tensor arguments, in order."""
        outs = list(flat_ids(node.outs))
        for out, placement in zip(outs, outputs, strict=True):
            self._values.place(out, placement)
            self._phases[out] = node.origin.phase
        if node.op in CASTS and ids[0] in self.stored and node.origin.phase != "optimizer":
            self.stored.update(outs)
        replaced = iter(self._walkable(node, ids))
        args, kwargs = map_args(
            (node.args, node.kwargs), lambda leaf: Ref(next(replaced)) if isinstance(leaf, Ref) else leaf
        )
        shapes = tuple(self._values.local_shape(o) for o in outs)
        self.append(Instruction(str(node.op), args, kwargs, node.outs, (), shapes, node.origin.where))

    def append(self, instruction: Instruction) -> None:
        if is_view(instruction.op):
            self._strided.update(flat_ids(instruction.outs))
        self.code.append(instruction)

    def dense(self, id_: int, origin: Origin) -> int:
        """Value `id_` in memory of its own order: kernels of fused optimizers walk through it from end to end."""
        if id_ not in self._strided:
            return id_
        out = self._values.new(self._values.type(id_), self._at(id_))
        shapes = (self._values.local_shape(out),)
        kwargs = {"memory_format": torch.contiguous_format}
        self.code.append(Instruction(str(aten.clone.default), (Ref(id_),), kwargs, out, (), shapes, origin.where))
        return out

    def _walkable(self, node: Node, ids: Sequence[int]) -> Sequence[int]:
        """`ids` with those that the kernel takes to lie densely brought to lie so. Where they do, which is
        seen when the program runs, nothing is done."""
        walked = WALKED.get(node.op)
        if walked is None:
            return ids
        names = Call(node, self._values.types).input_names
        return [self._contiguous(i, node.origin) if n in walked else i for i, n in zip(ids, names, strict=True)]

    def _contiguous(self, id_: int, origin: Origin) -> int:
        out = self._values.new(self._values.type(id_), self._at(id_))
        shapes = (self._values.local_shape(out),)
        self.code.append(Instruction(str(aten.contiguous.default), (Ref(id_),), {}, out, (), shapes, origin.where))
        return out

    def phases(self) -> dict[int, Phase]:
        """The phase of every value that was made: of one that was moved, that of the node it was moved for."""
        phase: Phase = "forward"
        for instruction in reversed(self.code):
            for out in flat_ids(instruction.outs):
                phase = self._phases.setdefault(out, phase)
        return self._phases
