"""Nodes again, in other types: every operand is cast to the type in which a node wants it, and no more than once.

In: nodes, one after another, each with the types to compute it in. Out: nodes with casts among them, and types.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Any

import torch

from moai.graph.step_graph import Node, Origin, Ref, TensorType, flat_ids, map_args

aten = torch.ops.aten

Retyped = Mapping[torch.dtype, torch.dtype]  # the type in the script -> the type to compute in; others stay

AS_WRITTEN: Retyped = {}
BF16: Retyped = {torch.float32: torch.bfloat16}
LARGEST_BF16 = torch.finfo(torch.bfloat16).max


class Retyping:
    """Collects `nodes` and `types`.

    `parameters`: inputs to be cast whole, whatever view of them is asked for.
    `fixed`: values that keep the type they have in the script.
    """

    def __init__(self, types: Sequence[TensorType], parameters: AbstractSet[int], fixed: AbstractSet[int]):
        self.nodes: list[Node] = []
        self.types = list(types)
        self._written = types
        self._fixed = fixed
        self._of_parameters = set(parameters)  # parameters and views of them
        self._views: dict[int, Node] = {}
        self._constants: dict[int, Node] = {}
        self._exact = set[int]()  # constants that bf16 holds exactly, and views of them
        self._versions: dict[Any, int] = {}

    def emit(self, node: Node, operands: Sequence[int], to: Retyped, keep: AbstractSet[int] = frozenset()) -> None:
        """Append `node`, which reads `operands`, computed in the types that `to` says; the values in `keep` have those
        of the script."""

        def operand(leaf: Any) -> Any:
            if not isinstance(leaf, Ref):
                return leaf
            written = self._written[leaf.id].dtype
            dtype = written if leaf.id in keep else to.get(written, written)
            return Ref(self.version(leaf.id, dtype, node.origin))

        if to is AS_WRITTEN and all(self.types[i] is self._written[i] for i in operands):
            self.nodes.append(node)
        else:
            self.append(node, map_args(node.args, operand), map_args(node.kwargs, operand), to, keep)

    def append(
        self, node: Node, args: Any, kwargs: Any, to: Retyped = AS_WRITTEN, keep: AbstractSet[int] = frozenset()
    ) -> None:
        """Append `node` with other arguments, and results of the types that `to` says."""
        casts = []

        def result(id_: int | None) -> int | None:
            if id_ is None or id_ in keep:
                return id_
            written = self._written[id_]
            if written.dtype not in to:
                return id_
            type_ = TensorType(written.shape, to[written.dtype])
            if id_ not in self._fixed:
                self.types[id_] = type_
                return id_
            casts.append((id_, self.new(type_)))
            return casts[-1][1]

        outs = map_args(node.outs, result) if to else node.outs
        self.nodes.append(Node(node.op, args, kwargs, outs, node.origin))
        for id_, found in casts:
            self._versions[id_, self.types[found].dtype, None] = found
            self._append_cast(found, id_, node.origin)

    def append_view(self, node: Node) -> None:
        """Append a view, in the type that its source has now."""
        source = node.args[0].id
        outs = tuple(flat_ids(node.outs))
        for known in (self._of_parameters, self._exact):
            if source in known:
                known.update(outs)
        self._views.update(dict.fromkeys(outs, node))
        narrow = self.types[source].dtype == torch.bfloat16 and self._fixed.isdisjoint(outs)
        self.emit(node, (source,), BF16 if narrow else AS_WRITTEN)

    def append_constant(self, node: Node) -> None:
        """Append aten.full of a number in fp32: it can be had in another type without a cast."""
        number = node.args[1]
        if isinstance(number, (int, float)) and torch.tensor(float(number), dtype=torch.bfloat16).item() == number:
            self._constants[node.outs] = node
            self._exact.add(node.outs)
        self.nodes.append(node)

    def is_exact(self, id_: int) -> bool:
        """Whether bf16 holds the value exactly because it is a constant."""
        return id_ in self._exact

    def version(self, id_: int, dtype: torch.dtype, origin: Origin) -> int:
        """The value `id_` in `dtype`. Of a view, the source is cast: one cast serves all the views of a value."""
        views: list[tuple[int, Node]] = []
        while (found := self._known(id_, dtype, origin)) is None and self._is_cast_at_source(id_):
            views.append((id_, self._views[id_]))
            id_ = self._views[id_].args[0].id
        if found is None:
            found = self._cast(id_, dtype, origin)
        for seen, view in reversed(views):
            self._append_view_of(found, view, dtype, origin)
            found = self._versions[self._key(seen, dtype, origin)]
        return found

    def saturated(self, id_: int, origin: Origin) -> None:
        """Cast `id_` to bf16 for those who will ask for it, with finite entries kept finite.

        Masks say "nowhere" with the least number of fp32, which bf16 would round to -inf: a row with nothing but -inf
        has no softmax, while one with nothing but the least number has.
        """
        if self._known(id_, torch.bfloat16, origin) is not None:
            return
        type_ = self.types[id_]
        infinite = self._append_new(aten.isinf.default, (Ref(id_),), type_.shape, torch.bool, origin)
        bounds = (-LARGEST_BF16, LARGEST_BF16)
        inside = self._append_new(aten.clamp.default, (Ref(id_), *bounds), type_.shape, type_.dtype, origin)
        args = (Ref(infinite), Ref(id_), Ref(inside))
        kept = self._append_new(aten.where.self, args, type_.shape, type_.dtype, origin)
        self._versions[self._key(id_, torch.bfloat16, origin)] = self._cast(kept, torch.bfloat16, origin)

    def new(self, type_: TensorType) -> int:
        self.types.append(type_)
        return len(self.types) - 1

    def _key(self, id_: int, dtype: torch.dtype, origin: Origin) -> Any:
        # What the forward pass widened is widened again in the backward: the narrow value takes half the memory.
        return id_, dtype, origin.phase if dtype == torch.float32 else None

    def _known(self, id_: int, dtype: torch.dtype, origin: Origin) -> int | None:
        return id_ if self.types[id_].dtype == dtype else self._versions.get(self._key(id_, dtype, origin))

    def _is_cast_at_source(self, id_: int) -> bool:
        """Whether `id_` is a view, and casting its source does no work on entries that nobody wants."""
        if id_ not in self._views:
            return False
        source = self._views[id_].args[0].id
        return source in self._of_parameters or self.types[source].numel <= self.types[id_].numel

    def _append_view_of(self, source: int, view: Node, dtype: torch.dtype, origin: Origin) -> None:
        """Append `view` of another version of its source, for all its results."""

        def result(id_: int) -> int:
            found = self.new(TensorType(self.types[id_].shape, dtype))
            self._versions[self._key(id_, dtype, origin)] = found
            return found

        args = (Ref(source), *view.args[1:])
        self.nodes.append(replace(view, args=args, outs=map_args(view.outs, result), origin=origin))

    def _cast(self, id_: int, dtype: torch.dtype, origin: Origin) -> int:
        found = self.new(TensorType(self.types[id_].shape, dtype))
        self._versions[self._key(id_, dtype, origin)] = found
        if id_ in self._constants:
            self.nodes.append(replace(self._constants[id_], kwargs={"dtype": dtype}, outs=found, origin=origin))
        else:
            self._append_cast(id_, found, origin)
        return found

    def _append_cast(self, id_: int, out: int, origin: Origin) -> None:
        kwargs = {"dtype": self.types[out].dtype}
        self.nodes.append(Node(aten._to_copy.default, (Ref(id_),), kwargs, out, origin))

    def _append_new(self, op: Any, args: tuple[Any, ...], shape: tuple[int, ...], dtype: Any, origin: Origin) -> int:
        found = self.new(TensorType(shape, dtype))
        self.nodes.append(Node(op, args, {}, found, origin))
        return found
