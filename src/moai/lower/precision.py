"""Another floating type between the inputs and the outputs of a step.

In: canonical nodes. Out: nodes and types in which values are held, and operators computed, as `precision` says. Inputs
and outputs keep their types: parameters and states stay as they are, and so does what the script sees.

"bf16" is mixed precision as under torch.autocast, for a script written in fp32:

- Products of matrices, attention among them, take bf16 and give bf16, forwards and backwards.
- Views, and operators that work entry by entry, follow what they are given; where bf16 meets fp32 they are in fp32.
  Thus the residual stream is fp32, since it starts with fp32 rows of the embedding: as autocast has it, and its many
  additions lose nothing. Embeddings are read from the fp32 table for that reason.
- All else is in fp32: reductions, norms, softmax, losses, powers and exponentials, and what nobody thought of.
- A parameter is cast once, before any view of it. The gradient of a parameter is cast back directly after its product:
  from there on, through sums over micro-batches and devices, clipping and the optimizer, nothing is bf16. Where the
  gradients of a value's several uses meet, they are added in fp32 as well.

A script that computes products in half precision, by autocast or on its own, has made its choice: it is left alone.

"fp64" holds every fp32 value as fp64. Random numbers are drawn in fp32, so that they are those of the script; grouped
products and gradient scalers, which have no fp64 kernels, run in fp32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal

import torch

from moai.graph import ops  # noqa: F401  (registers torch.ops.moai)
from moai.graph.step_graph import Input, Node, Ref, TensorType, flat_ids, map_args, refs
from moai.lower.canonical import needed
from moai.lower.retyping import AS_WRITTEN, BF16, LARGEST_BF16, Retyped, Retyping

aten = torch.ops.aten
moai = torch.ops.moai

_FP64: Retyped = {torch.float32: torch.float64, torch.complex64: torch.complex128}
_HALVES = frozenset({torch.bfloat16, torch.float16})

_OF_GROUPS = frozenset({aten._grouped_mm.default, moai.rows_mm.default, moai.rows_outer.default})
# Products, with the position of a factor whose last dim is contracted (None: it is not known to be one).
_PRODUCTS: dict[torch._ops.OpOverload, int | None] = {
    **dict.fromkeys((aten.mm.default, aten.bmm.default, aten.mv.default), 0),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addmv.default), 1),
    **dict.fromkeys(
        (
            *_OF_GROUPS, aten.convolution.default, aten.convolution_backward.default,
            moai.sdpa.default, moai.sdpa_backward.default,
        )
    ),
}  # fmt: skip

_ATTENTION = frozenset({moai.sdpa.default, moai.sdpa_backward.default})

# Views of their first argument, the only tensor among their arguments.
_VIEWS = frozenset(
    {
        aten.reshape.default, aten.permute.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.default,
        aten.squeeze.dim, aten.squeeze.dims, aten.slice.Tensor, aten.select.int, aten.diagonal.default,
        aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default, aten.unbind.int, aten.unfold.default,
    }
)  # fmt: skip

# They move entries about, or work on few of them: in the type that they are given, as pointwise operators do.
_MOVES = frozenset(
    {
        aten.cat.default, aten.stack.default, aten.copy.default, aten.repeat.default, aten.flip.default,
        aten.roll.default, aten.tril.default, aten.triu.default, aten.constant_pad_nd.default,
        aten.slice_backward.default, aten.select_backward.default, aten.slice_scatter.default,
        aten.select_scatter.default, aten.embedding.default, aten.index.Tensor, aten._unsafe_index.Tensor,
        aten.index_select.default, aten.gather.default, aten.where.ScalarOther, aten.where.ScalarSelf,
        aten.masked_fill.Tensor, aten.glu.default, aten.glu_backward.default, aten.hardtanh_backward.default,
        aten.leaky_relu_backward.default, aten.elu_backward.default, aten.hardsigmoid_backward.default,
        aten.hardswish_backward.default, aten.mish_backward.default, aten._prelu_kernel.default,
        aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default,
        aten.avg_pool2d.default, aten.avg_pool2d_backward.default,
    }
)  # fmt: skip

# Entry by entry, but too steep for bf16: the pointwise part of autocast's list of operators in fp32.
_STEEP = frozenset(
    {
        aten.acos.default, aten.asin.default, aten.cosh.default, aten.erfinv.default, aten.exp.default,
        aten.exp2.default, aten.expm1.default, aten.log.default, aten.log10.default, aten.log2.default,
        aten.log1p.default, aten.logaddexp.default, aten.logaddexp2.default, aten.xlogy.Tensor,
        aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other, aten.logit.default, aten.pow.Scalar,
        aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.reciprocal.default, aten.rsqrt.default,
        aten.sinh.default, aten.softplus.default, aten.tan.default,
    }
)  # fmt: skip

# They read bf16 and add up in fp32 when told that the result is fp32.
_SUMS = frozenset({aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim})

# Random numbers differ by the type they are drawn in; bits of fp32 are no fp64; the others have no kernel for fp64.
_FP32_ALWAYS = frozenset(
    {
        moai.random.default, moai.multinomial.default, moai.as_strided_scatter.default, aten.view.dtype,
        aten._amp_foreach_non_finite_check_and_unscale.default, aten._amp_update_scale.default,
        *_OF_GROUPS,
    }
)  # fmt: skip

# Arguments and results that are fp32 in whatever type the operator computes.
_STATISTICS = frozenset({"lse"})
_COUNTERS = frozenset({"state_steps", "lr", "grad_scale", "found_inf"})  # of fused optimizers


def in_precision(
    nodes: list[Node],
    types: Sequence[TensorType],
    inputs: Sequence[Input],
    outputs: Sequence[int],
    precision: Literal["fp32", "bf16", "fp64"] | None,
) -> tuple[list[Node], list[TensorType]]:
    """`nodes` computed in `precision` ("fp32" and None: as they are), and the types of all values, old and new.

    The ids in `inputs` and `outputs` keep their types. Other values may have a new one; new values follow in the list.
    """
    if precision == "fp64":
        return _in_fp64(nodes, types, outputs)
    if precision == "bf16":
        return _in_bf16(nodes, types, inputs, outputs)
    return nodes, list(types)


class _Kind(Enum):
    """How "bf16" treats a node."""

    AS_WRITTEN = auto()
    PRODUCT = auto()
    FOLLOWS = auto()
    VIEW = auto()
    CONSTANT = auto()
    SUM = auto()
    CAST = auto()


@dataclass(frozen=True, slots=True)
class _Treated:
    """A node, how "bf16" treats it, and the values it reads."""

    node: Node
    kind: _Kind
    operands: list[int]


def _in_bf16(
    nodes: list[Node], types: Sequence[TensorType], inputs: Sequence[Input], outputs: Sequence[int]
) -> tuple[list[Node], list[TensorType]]:
    kinds = _Kinds(types)
    treated = [kinds.treated(node) for node in nodes]
    if kinds.chosen_by_script:
        return nodes, list(types)
    parameters = {i.id for i in inputs if not i.batch and types[i.id].dtype == torch.float32}
    walk = Retyping(types, parameters, _fixed(treated, outputs))
    for one in treated:
        _add_in_bf16(walk, one)
    return needed(walk.nodes, outputs), walk.types


def _fixed(treated: Sequence[_Treated], outputs: Sequence[int]) -> set[int]:
    """The values that are to be fp32 at once: outputs, and products that nobody reads in bf16, such as gradients of
    parameters."""
    fixed = set(outputs)
    read: set[int] = set()
    for one in reversed(treated):
        if one.kind is _Kind.PRODUCT:
            fixed.update(o for o in flat_ids(one.node.outs) if o not in read)
        if one.kind is _Kind.VIEW and read.isdisjoint(flat_ids(one.node.outs)):
            continue
        if one.kind is not _Kind.AS_WRITTEN:
            read.update(one.operands)
    return fixed


def _add_in_bf16(walk: Retyping, one: _Treated) -> None:
    node = one.node
    match one.kind:
        case _Kind.PRODUCT:
            mask = _argument(node, "mask") if node.op in _ATTENTION else None
            if mask is not None and walk.types[mask.id].dtype == torch.float32:
                walk.saturated(mask.id, node.origin)
            walk.emit(node, one.operands, BF16, _named(node, _STATISTICS) if node.op in _ATTENTION else frozenset())
        case _Kind.FOLLOWS:
            _follow(walk, one)
        case _Kind.VIEW:
            walk.append_view(node)
        case _Kind.CONSTANT:
            walk.append_constant(node)
        case _Kind.SUM if walk.types[one.operands[0]].dtype == torch.bfloat16:
            walk.append(node, node.args, node.kwargs | {"dtype": torch.float32})
        case _Kind.CAST:
            walk.append(node, node.args, node.kwargs)
        case _:
            walk.emit(node, one.operands, AS_WRITTEN)


def _follow(walk: Retyping, one: _Treated) -> None:
    given = (walk.types[i].dtype for i in one.operands if not walk.is_exact(i))
    if {dtype for dtype in given if dtype.is_floating_point} == {torch.bfloat16}:
        node = one.node
        args, kwargs = map_args(node.args, _within_bf16), map_args(node.kwargs, _within_bf16)
        walk.emit(Node(node.op, args, kwargs, node.outs, node.origin), one.operands, BF16)
    else:
        walk.emit(one.node, one.operands, AS_WRITTEN)


class _Kinds:
    """How each node is to be treated, asked in order.

    `chosen_by_script`: the script has products in half precision, other than in its optimizer.
    """

    def __init__(self, types: Sequence[TensorType]):
        self.chosen_by_script = False
        self._types = types
        self._gradients = set[int]()  # results of the backward pass, and what a script makes of them
        self._counts = set[int]()  # fp32 values made of constants and integers alone

    def treated(self, node: Node) -> _Treated:
        operands = _operands(node)
        return _Treated(node, self._kind(node, operands, tuple(flat_ids(node.outs))), operands)

    def _kind(self, node: Node, operands: Sequence[int], outs: tuple[int, ...]) -> _Kind:
        phase = node.origin.phase
        updates = phase == "optimizer" or (phase == "forward" and not self._gradients.isdisjoint(operands))
        if updates or phase == "backward":
            self._gradients.update(outs)
        counts = all(i in self._counts or not self._is_float(i) for i in operands)
        if counts:
            self._counts.update(outs)
        if updates:
            return _Kind.AS_WRITTEN
        if node.op in _PRODUCTS and any(self._types[o].dtype in _HALVES for o in outs):
            self.chosen_by_script = True
        if node.op is aten._to_copy.default:
            return _Kind.CAST
        if any(self._is_float(i) and self._types[i].dtype != torch.float32 for i in (*operands, *outs)):
            return _Kind.AS_WRITTEN
        if node.op in _PRODUCTS:
            # Numbers that count or point somewhere are not to be rounded.
            return _Kind.AS_WRITTEN if counts or not self._gains(node) else _Kind.PRODUCT
        return self._by_operator(node, outs)

    def _by_operator(self, node: Node, outs: tuple[int, ...]) -> _Kind:
        if node.op in _VIEWS and self._is_float(outs[0]):
            return _Kind.VIEW
        if node.op is aten.full.default and self._is_float(outs[0]):
            return _Kind.CONSTANT
        if node.op in _SUMS and self._is_float(outs[0]):
            return _Kind.SUM
        if node.op is aten.add.Tensor and node.origin.phase == "backward":
            return _Kind.AS_WRITTEN  # where gradients meet
        pointwise = torch.Tag.pointwise in node.op.tags and node.op not in _STEEP
        return _Kind.FOLLOWS if pointwise or node.op in _MOVES else _Kind.AS_WRITTEN

    def _is_float(self, id_: int) -> bool:
        dtype = self._types[id_].dtype
        return dtype.is_floating_point or dtype.is_complex

    def _gains(self, node: Node) -> bool:
        """Whether a product is faster in bf16, and possible. A product over one entry is no reduction: libraries write
        so the angles of rotary embeddings, positions times frequencies, and bf16 cannot count to 257."""
        if node.op in _OF_GROUPS:
            groups = next(t for t in (*refs(node.args), Ref(node.outs)) if len(self._types[t.id].shape) == 3)
            aligned = all(size % 8 == 0 for size in self._types[groups.id].shape[1:])
            return aligned and not any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values()))
        factor = _PRODUCTS[node.op]
        return factor is None or self._types[node.args[factor].id].shape[-1] != 1


def _within_bf16(leaf: Any) -> Any:
    """A number in a node's arguments, if it has to be rounded to the nearest one that bf16 can hold."""
    if isinstance(leaf, float) and math.isfinite(leaf) and abs(leaf) > LARGEST_BF16:
        return math.copysign(LARGEST_BF16, leaf)
    return leaf


def _in_fp64(
    nodes: list[Node], types: Sequence[TensorType], outputs: Sequence[int]
) -> tuple[list[Node], list[TensorType]]:
    walk = Retyping(types, frozenset(), frozenset(outputs))
    for node in nodes:
        operands = _operands(node)
        if _stays_as_written(node, operands, types):
            walk.emit(node, operands, AS_WRITTEN)
        else:
            args, kwargs = map_args(node.args, _wide_dtype), map_args(node.kwargs, _wide_dtype)
            keep = _named(node, _COUNTERS) if "_fused_" in node.op._schema.name else frozenset()
            walk.emit(Node(node.op, args, kwargs, node.outs, node.origin), operands, _FP64, keep)
    return needed(walk.nodes, outputs), walk.types


def _stays_as_written(node: Node, operands: Sequence[int], types: Sequence[TensorType]) -> bool:
    """Whether "fp64" is nothing for `node`: it has nothing to do with fp32, or has to have fp32."""
    if node.op in _FP32_ALWAYS or any(types[i].dtype in _HALVES for i in (*operands, *flat_ids(node.outs))):
        return True
    if node.op is moai.as_strided.default and _argument(node, "dtype") != types[operands[0]].dtype:
        return True
    leaves = (*node.args, *node.kwargs.values())
    return not any(types[i].dtype in _FP64 for i in operands) and all(_wide_dtype(leaf) is leaf for leaf in leaves)


def _wide_dtype(leaf: Any) -> Any:
    return _FP64.get(leaf, leaf) if isinstance(leaf, torch.dtype) else leaf


def _operands(node: Node) -> list[int]:
    return [r.id for r in refs((node.args, node.kwargs))]


def _argument(node: Node, name: str) -> Any:
    """The argument `name` of `node`, None if it is not given."""
    names = (a.name for a in node.op._schema.arguments)
    return dict(zip(names, node.args, strict=False)).get(name, node.kwargs.get(name))


def _named(node: Node, names: AbstractSet[str]) -> set[int]:
    """The values that arguments and results of these names stand for."""
    found = {r.id for name in names for r in refs(_argument(node, name))}
    if len(node.op._schema.returns) > 1:
        returned = zip(node.op._schema.returns, node.outs, strict=True)
        found.update(o for schema, outs in returned if schema.name in names for o in flat_ids(outs))
    return found
