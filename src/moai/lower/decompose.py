"""Operators to be taken apart before their batch can be split: they divide by a count, or mix samples.

In: a node, and which of its inputs are split. Out: nodes with the same meaning for which there are rules, or None where
the node may stay as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from moai.graph.placement import Placement
from moai.graph.rules.dims import Call, argument_names
from moai.graph.rules.indexing import INTO_ZEROS
from moai.graph.rules.nn import MEAN, SUM
from moai.graph.step_graph import Node, Ref, Scalar, TensorType, map_args
from moai.lower.values import Values

aten = torch.ops.aten


class Builder:
    """Appends nodes in place of `call`'s."""

    def __init__(self, call: Call, values: Values):
        self.call = call
        self.nodes: list[Node] = []
        self._values = values

    def __call__(self, op: torch._ops.OpOverload, *args: Any, out: Any = None, **kwargs: Any) -> Any:
        """Append `op`; the result is `out`, ids of the node taken apart, or else new values. Gives Refs."""
        if out is None:
            found = op(*map_args(args, self._meta), **kwargs)
            fresh = [self._values.new(TensorType(tuple(t.shape), t.dtype)) for t in _as_tuple(found)]
            out = tuple(fresh) if isinstance(found, tuple) else fresh[0]
        self.nodes.append(Node(op, args, kwargs, out, self.call.node.origin))
        return tuple(Ref(i) for i in out) if isinstance(out, tuple) else Ref(out)

    def type(self, ref: Ref) -> TensorType:
        return self._values.type(ref.id)

    def is_zero(self, ref: Ref) -> bool:
        return self._values.is_zero(ref.id)

    def new(self, type_: TensorType) -> int:
        return self._values.new(type_)

    def changed(self, /, **changes: Any) -> tuple[Any, ...]:
        """The arguments of the node taken apart, by position, with some of them changed."""
        bound = self.call.args | changes
        return tuple(bound[name] for name in argument_names(self.call.op))

    def _meta(self, leaf: Any) -> Any:
        if isinstance(leaf, Scalar):
            return 1.0  # any number: types do not depend on it
        if not isinstance(leaf, Ref):
            return leaf
        type_ = self._values.type(leaf.id)
        return torch.empty(type_.shape, dtype=type_.dtype, device="meta")


def _as_tuple(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type to add up in: kernels accumulate half precision in single, and so do sums over devices."""
    return torch.float32 if dtype.itemsize < 4 else dtype


def mean(build: Builder, placements: Sequence[Placement]) -> None:
    call = build.call
    source = call.inputs[0]
    dims = call.dims("dim", len(source.shape))
    if _split_dims(placements[0]).isdisjoint(dims):
        return
    out = call.outputs[0].dtype
    count = math.prod(source.shape[d] for d in dims)
    total = build(aten.sum.dim_IntList, call["self"], dims, bool(call.args.get("keepdim")), dtype=_wide(out))
    if _wide(out) == out:
        build(aten.div.Scalar, total, count, out=call.node.outs)
    else:
        build(aten._to_copy.default, build(aten.div.Scalar, total, count), out=call.node.outs, dtype=out)


def sum_(build: Builder, placements: Sequence[Placement]) -> None:
    """A sum to one number in half precision: its terms are not rounded before they are added over the devices."""
    call = build.call
    source, out = call.inputs[0], call.outputs[0]
    if out.numel > 1 or _wide(out.dtype) == out.dtype or not out.dtype.is_floating_point:
        return
    dims = call.dims("dim", len(source.shape))
    total = build(aten.sum.dim_IntList, call["self"], dims, bool(call.args.get("keepdim")), dtype=_wide(out.dtype))
    build(aten._to_copy.default, total, out=call.node.outs, dtype=out.dtype)


def euclidean_norm(build: Builder, placements: Sequence[Placement]) -> None:
    call = build.call
    source = call.inputs[0]
    dims = call.dims("dim", len(source.shape))
    if call["ord"] != 2 or _split_dims(placements[0]).isdisjoint(dims) or not source.dtype.is_floating_point:
        return
    out = call.outputs[0].dtype
    x = build(aten._to_copy.default, call["self"], dtype=_wide(out))
    total = build(aten.sum.dim_IntList, build(aten.mul.Tensor, x, x), dims, bool(call["keepdim"]))
    build(aten._to_copy.default, build(aten.sqrt.default, total), out=call.node.outs, dtype=out)


def class_loss(build: Builder, placements: Sequence[Placement]) -> None:
    """nll_loss with a mean: the sum of the losses over the sum of the weights, both over the whole batch. The weights
    are summed apart: they are known before the scores are."""
    call = build.call
    if call["reduction"] != MEAN:
        return
    loss, weight = call.node.outs
    target, weights, ignored = call["target"], call["weight"], call["ignore_index"]
    dtype = build.type(call["self"]).dtype
    count = build(torch.ops.moai.class_weight.default, target, weights, ignored, dtype, out=weight)
    if loss is not None:
        unused = build.new(TensorType((), dtype))
        total, _ = build(call.op, call["self"], target, weights, SUM, ignored, out=(build.new(call.outputs[0]), unused))
        build(aten.div.Tensor, total, count, out=loss)


def mean_loss(build: Builder, placements: Sequence[Placement]) -> None:
    """mse_loss and its like with a mean: the sum, divided by the global count."""
    call = build.call
    if call["reduction"] != MEAN:
        return
    count = max(t.numel for t in call.inputs)
    total = build(call.op, *build.changed(reduction=SUM))
    build(aten.div.Scalar, total, count, out=call.node.outs)


def mean_loss_backward(build: Builder, placements: Sequence[Placement]) -> None:
    call = build.call
    if call["reduction"] != MEAN:
        return
    count = max(t.numel for t in call.inputs)
    grad = build(aten.div.Scalar, call["grad_output"], count)
    build(call.op, *build.changed(grad_output=grad, reduction=SUM), out=call.node.outs)


def _split_dims(placement: Placement) -> set[int]:
    return {s.dim for s in placement.shards}


def times(build: Builder, x: Ref, number: Any) -> Ref:
    """`x` times a number, as a new node if that changes anything."""
    return x if number == 1 else build(aten.mul.Scalar, x, number)


def plus_product(build: Builder, placements: Sequence[Placement]) -> None:
    """addmm, baddbmm, addmv: a product contracted over split dims is a sum; the bias is added to it once."""
    call = build.call
    product = {
        aten.addmm.default: aten.mm.default,
        aten.baddbmm.default: aten.bmm.default,
        aten.addmv.default: aten.mv.default,
    }[call.op]
    rank = len(call.inputs[1].shape)
    left, right = placements[1:]
    row = len(call.inputs[2].shape) - 2 if rank > 1 and len(call.inputs[2].shape) > 1 else 0
    if rank - 1 not in _split_dims(left) and row not in _split_dims(right):
        return
    bias, a, b = (call[n] for n in call.input_names)
    found = times(build, build(product, a, b), call["alpha"])
    build(aten.add.Tensor, found, times(build, bias, call["beta"]), out=call.node.outs)


def accumulate(build: Builder, placements: Sequence[Placement]) -> None:
    """index_put(accumulate=True) and its like: what is added is summed apart from what is there."""
    call = build.call
    target: Ref = call["self"]
    if not call.args.get("accumulate", True) or build.is_zero(target):
        return
    if not any(p.shards for p in placements[1:]):
        return
    into = call.type_of(target)
    zeros = build(aten.full.default, into.shape, 0, out=build.new(into), dtype=into.dtype)
    added = build(call.op, *build.changed(self=zeros), out=build.new(into))
    build(aten.add.Tensor, target, added, out=call.node.outs)


def _channels(build: Builder, x: Ref, of: TensorType) -> Ref:
    """[C] as [1, C, 1, ...], to meet a tensor of `of`'s rank."""
    shape = tuple(build.type(x).shape[0] if d == 1 else 1 for d in range(len(of.shape)))
    return build(aten.reshape.default, x, shape)


def batch_norm(build: Builder, placements: Sequence[Placement]) -> None:
    """Batch norm in training: mean and variance are those of the global batch (two sums, for their accuracy)."""
    call = build.call
    if not call.args.get("training", call.args.get("train")):
        return
    source = call.inputs[0]
    wide = _wide(source.dtype)
    dims = tuple(d for d in range(len(source.shape)) if d != 1)
    count = math.prod(source.shape[d] for d in dims)
    x = build(aten._to_copy.default, call["input"], dtype=wide)
    average = build(aten.div.Scalar, build(aten.sum.dim_IntList, x, dims), count)
    centred = build(aten.sub.Tensor, x, _channels(build, average, source))
    variance = build(
        aten.div.Scalar, build(aten.sum.dim_IntList, build(aten.mul.Tensor, centred, centred), dims), count
    )
    scale = build(aten.rsqrt.default, build(aten.add.Scalar, variance, call["eps"]))
    found = build(aten.mul.Tensor, centred, _channels(build, scale, source))
    if call["weight"] is not None:
        found = build(aten.mul.Tensor, found, _channels(build, call["weight"], source))
    if call["bias"] is not None:
        found = build(aten.add.Tensor, found, _channels(build, call["bias"], source))
    results = [found, average, scale]
    if call.op is aten._native_batch_norm_legit_functional.default:
        unbiased = build(aten.mul.Scalar, variance, count / max(count - 1, 1))
        for name, seen in (("running_mean", average), ("running_var", unbiased)):
            kept = build(aten.mul.Scalar, call[name], 1 - call["momentum"])
            results.append(build(aten.add.Tensor, kept, build(aten.mul.Scalar, seen, call["momentum"])))
    for result, out in zip(results, call.node.outs, strict=True):
        if out is not None:
            build(aten._to_copy.default, result, out=out, dtype=build.type(Ref(out)).dtype)


def batch_norm_backward(build: Builder, placements: Sequence[Placement]) -> None:
    call = build.call
    if not call["train"]:
        return
    source = call.type_of(call["input"])
    wide = _wide(source.dtype)
    dims = tuple(d for d in range(len(source.shape)) if d != 1)
    count = math.prod(source.shape[d] for d in dims)
    grad = build(aten._to_copy.default, call["grad_out"], dtype=wide)
    x = build(aten._to_copy.default, call["input"], dtype=wide)
    scale = _channels(build, call["save_invstd"], source)
    centred = build(aten.sub.Tensor, x, _channels(build, call["save_mean"], source))
    normed = build(aten.mul.Tensor, centred, scale)
    of_bias = build(aten.sum.dim_IntList, grad, dims)
    of_weight = build(aten.sum.dim_IntList, build(aten.mul.Tensor, grad, normed), dims)
    shift = build(aten.div.Scalar, _channels(build, of_bias, source), count)
    slope = build(aten.div.Scalar, _channels(build, of_weight, source), count)
    of_input = build(aten.sub.Tensor, build(aten.sub.Tensor, grad, shift), build(aten.mul.Tensor, normed, slope))
    of_input = build(aten.mul.Tensor, of_input, scale)
    if call["weight"] is not None:
        of_input = build(aten.mul.Tensor, of_input, _channels(build, call["weight"], source))
    for result, out in zip((of_input, of_weight, of_bias), call.node.outs, strict=True):
        if out is not None:
            build(aten._to_copy.default, result, out=out, dtype=build.type(Ref(out)).dtype)


_LOSSES = (
    aten.mse_loss.default,
    aten.smooth_l1_loss.default,
    aten.huber_loss.default,
    aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default,
    aten.soft_margin_loss.default,
)
_LOSS_BACKWARDS = (
    aten.mse_loss_backward.default,
    aten.smooth_l1_loss_backward.default,
    aten.huber_loss_backward.default,
    aten.binary_cross_entropy_backward.default,
    aten.soft_margin_loss_backward.default,
)

DECOMPOSITIONS: dict[torch._ops.OpOverload, Callable[[Builder, Sequence[Placement]], None]] = {
    **dict.fromkeys((aten.mean.default, aten.mean.dim), mean),
    **dict.fromkeys((aten.sum.default, aten.sum.dim_IntList), sum_),
    aten.linalg_vector_norm.default: euclidean_norm,
    **dict.fromkeys((aten.nll_loss_forward.default, aten.nll_loss2d_forward.default), class_loss),
    **dict.fromkeys(_LOSSES, mean_loss),
    **dict.fromkeys(_LOSS_BACKWARDS, mean_loss_backward),
    **dict.fromkeys((aten.addmm.default, aten.baddbmm.default, aten.addmv.default), plus_product),
    **dict.fromkeys(INTO_ZEROS, accumulate),
    **dict.fromkeys(
        (
            aten.native_batch_norm.default,
            aten._native_batch_norm_legit.no_stats,
            aten._native_batch_norm_legit_functional.default,
        ),
        batch_norm,
    ),
    aten.native_batch_norm_backward.default: batch_norm_backward,
}


def decompose(call: Call, placements: Sequence[Placement], values: Values) -> list[Node] | None:
    """The nodes that stand for `call`, or None: it may stay. `placements` are those of its inputs."""
    rewrite = DECOMPOSITIONS.get(call.op)
    if rewrite is None or not any(p.shards for p in placements):
        return None
    build = Builder(call, values)
    rewrite(build, placements)
    return build.nodes or None
