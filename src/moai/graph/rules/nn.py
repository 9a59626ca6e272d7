"""Rules of layers: softmax, norms, convolutions, pools, attention and losses by class, forwards and backwards.

Their samples are independent: every rule splits the batch, and a weight's gradient is a sum over it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from moai.graph.rules.dims import Call, DimFactors, Dims, Rule, Unit
from moai.graph.rules.views import along
from moai.graph.step_graph import TensorType

aten = torch.ops.aten
moai = torch.ops.moai

NONE, MEAN, SUM = 0, 1, 2  # values of the `reduction` argument of losses

_PER_SAMPLE = frozenset({"grad_out", "grad_output", "input", "mean", "rstd"})


def _whole(tensor: TensorType) -> DimFactors:
    return (None,) * len(tensor.shape)


def _batch(tensor: TensorType) -> DimFactors:
    """Split by dim 0 alone."""
    return ("n", *(None,) * (len(tensor.shape) - 1)) if tensor.shape else ()


def _inputs(call: Call, named: Mapping[str, DimFactors]) -> tuple[DimFactors, ...]:
    """The factors of the arguments in `named`; every other tensor stays whole."""
    return tuple(named.get(n, _whole(t)) for n, t in zip(call.input_names, call.inputs, strict=True))


def _per_sample(call: Call) -> tuple[DimFactors, ...]:
    """Samples and their statistics are split by dim 0; weights stay whole."""
    return _inputs(call, {n: _batch(t) for n, t in zip(call.input_names, call.inputs, strict=True) if n in _PER_SAMPLE})


def _gradients(call: Call, of_input: DimFactors) -> tuple[DimFactors, ...]:
    """The factors of a backward's outputs: those of the input's gradient (if asked for), then whole weights."""
    whole = [_whole(t) for t in call.outputs]
    # An absent gradient comes as None, or, with some operators, as an unused tensor.
    if call["output_mask"][0]:
        whole[0] = of_input
    return tuple(whole)


def trailing_norm(call: Call) -> Dims | None:
    """layer norm and RMS norm: the dims before `normalized_shape` are free."""
    rank = len(call.inputs[0].shape)
    lead = rank - len(call["normalized_shape"])
    if lead == 0:
        return None
    free = (*range(lead), *(None,) * (rank - lead))
    inputs = _inputs(call, dict.fromkeys(("grad_out", "input", "mean", "rstd"), free))
    if "output_mask" not in call.args:
        return Dims(inputs, (free,) * len(call.outputs))
    return Dims(inputs, _gradients(call, free), summed=frozenset(range(lead)))


def group_norm(call: Call) -> Dims:
    inputs = _per_sample(call)
    if "output_mask" not in call.args:
        return Dims(inputs, tuple(map(_batch, call.outputs)), sizes={"N": ("n",)})
    return Dims(inputs, _gradients(call, _batch(call.inputs[0])), summed=frozenset("n"), sizes={"N": ("n",)})


def convolution(call: Call) -> Dims:
    inputs = _per_sample(call)
    if call.op is aten.convolution.default:
        return Dims(inputs, (_batch(call.outputs[0]),))
    return Dims(inputs, _gradients(call, _batch(call.inputs[0])), summed=frozenset("n"))


def batch_norm_inference(call: Call) -> Dims | None:
    """Batch norm with its running statistics; over the batch's own ones, `lower` takes it apart."""
    if call.args.get("training"):
        return None
    outputs = (_batch(call.outputs[0]), *map(_whole, call.outputs[1:]))
    if any(t.numel for t in call.outputs[1:]):  # statistics of the running kind: the same on every device
        return None
    return Dims(_inputs(call, {"input": _batch(call.inputs[0])}), outputs, summed=frozenset("n"))


def batch_norm_backward(call: Call) -> Dims | None:
    if call["train"]:
        return None
    batch = _batch(call.inputs[0])
    inputs = _inputs(call, {"grad_out": batch, "input": batch})
    return Dims(inputs, _gradients(call, batch), summed=frozenset("n"))


def by_sample(call: Call) -> Dims:
    """Pools and resizings: dim 0 (samples, or channels without them) is free in every tensor."""
    sizes = {"input_size": ("n",)} if "input_size" in call.args else {}
    return Dims(tuple(map(_batch, call.inputs)), tuple(map(_batch, call.outputs)), sizes=sizes)


def rearranged(call: Call) -> Dims | None:
    """What moves pixels to channels, or back, by its samples."""
    batched = 3 if call.op is aten.col2im.default else 4
    return by_sample(call) if len(call.inputs[0].shape) == batched else None


def distances(call: Call) -> Dims | None:
    """cdist of [P, M] and [R, M], and what flows back to the former: over all of the latter."""
    if any(len(t.shape) != 2 for t in call.inputs):
        return None
    if call.op is aten._cdist_forward.default:
        return Dims((("p", None), ("r", None)), (("p", "r"),))
    return Dims((("p", "r"), ("p", None), ("r", None), ("p", "r")), (("p", None),), summed=frozenset("r"))


def attention(call: Call) -> Dims:
    """Scaled dot-product attention by its leading dims and its heads.

    Query heads that share a key head stay together; a single key head is whole everywhere, and its gradient is a sum.
    """
    query, key = call.type_of(call["q"]).shape, call.type_of(call["k"]).shape
    rank = len(query)
    if rank < 4:
        return _attention(call, tuple(range(rank - 2)), None, None)
    lead = tuple(range(rank - 3))
    heads, kv_heads = query[-3], key[-3]
    if heads == kv_heads:
        return _attention(call, lead, "h", "h")
    if kv_heads == 1:
        return _attention(call, lead, "h", None)
    return _attention(call, lead, Unit("h", heads // kv_heads), "h")


def _attention(call: Call, lead: tuple[int, ...], of_query: Any, of_key: Any) -> Dims:
    query = call.type_of(call["q"]).shape
    headed = len(query) >= 4

    def dims(name: str, tensor: TensorType) -> DimFactors:
        trailing = len(query) - len(lead) - (name == "lse")
        own = max(len(tensor.shape) - trailing, 0)  # a mask is broadcast, and may have fewer dims
        sizes = zip(lead[len(lead) - own :], tensor.shape, strict=False)
        ahead = tuple(f if size == query[f] else None for f, size in sizes)
        rest: list[Any] = [None] * (len(tensor.shape) - own)
        if headed and len(rest) == trailing:
            rest[0] = of_key if name in ("k", "v", "dk", "dv") else of_query
            if name == "mask" and tensor.shape[own] == 1:
                rest[0] = None
        return (*ahead, *rest)

    inputs = tuple(map(dims, call.input_names, call.inputs))
    names = ("out", "lse") if call.op is moai.sdpa.default else ("dq", "dk", "dv")
    present = [n for n, o in zip(names, call.node.outs, strict=True) if o is not None]
    outputs = tuple(map(dims, present, call.outputs))
    return Dims(inputs, outputs, summed=frozenset("h") if of_key is None else frozenset())


def repeat_heads(call: Call) -> Dims:
    rank = len(call.inputs[0].shape)
    rest = tuple(range(2, rank))
    return Dims(((0, None, *rest),), ((0, "h", *rest),), sizes={"n_heads": ("h",)}, starts={"start": "h"})


def sum_heads(call: Call) -> Dims:
    rank = len(call.inputs[0].shape)
    rest = tuple(range(2, rank))
    return Dims(((0, "h", *rest),), ((0, None, *rest),), summed=frozenset("h"), starts={"start": "h"})


def part_of_class_loss(call: Call) -> Dims:
    inputs = _inputs(call, {"self": ("n", "c"), "target": ("n",)})
    out = ("n",) if call.outputs[0].shape else ()
    return Dims(inputs, (out,), summed=frozenset({"n", "c"}), starts={"start": "c"})


def class_weight(call: Call) -> Dims:
    own = tuple(range(len(call.type_of(call["target"]).shape)))
    return Dims(_inputs(call, {"target": own}), ((),), summed=frozenset(own))


def part_of_class_loss_backward(call: Call) -> Dims:
    grad = ("n",) if call.type_of(call["grad"]).shape else ()
    inputs = _inputs(call, {"grad": grad, "target": ("n",)})
    return Dims(inputs, (("n", "c"),), sizes={"size": ("n", "c")}, starts={"start": "c"})


def class_loss(call: Call) -> Dims | None:
    """nll_loss of scores [N, C, ...] and targets [N, ...]: (loss, total weight) are sums over the samples."""
    scores = call.type_of(call["self"])
    unbatched = len(scores.shape) == 1
    if unbatched or call["reduction"] == MEAN:
        return None
    inputs = _inputs(call, {"self": _batch(scores), "target": _batch(call.type_of(call["target"]))})
    loss, weight = call.outputs
    return Dims(inputs, (_batch(loss), _whole(weight)), summed=frozenset("n"))


def class_loss_backward(call: Call) -> Dims | None:
    """A mean's backward divides by `total_weight`, which is the global one: no part needs to know the others."""
    scores = call.type_of(call["self"])
    if len(scores.shape) == 1:
        return None
    grad = call.type_of(call["grad_output"])
    named = {"self": _batch(scores), "target": _batch(call.type_of(call["target"]))}
    if grad.shape:
        named["grad_output"] = _batch(grad)
    return Dims(_inputs(call, named), (_batch(scores),))


_SAMPLEWISE = (
    aten.max_pool2d_with_indices.default, aten.max_pool2d_with_indices_backward.default,
    aten.max_pool3d_with_indices.default, aten.max_pool3d_with_indices_backward.default,
    aten.avg_pool2d.default, aten.avg_pool2d_backward.default,
    aten.avg_pool3d.default, aten.avg_pool3d_backward.default,
    aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool2d_backward.default,
    aten._adaptive_avg_pool3d.default, aten._adaptive_avg_pool3d_backward.default,
    aten.upsample_nearest1d.default, aten.upsample_nearest1d_backward.default,
    aten.upsample_nearest2d.default, aten.upsample_nearest2d_backward.default,
    aten.upsample_bilinear2d.default, aten.upsample_bilinear2d_backward.default,
    aten.upsample_bicubic2d.default, aten.upsample_bicubic2d_backward.default,
    aten.reflection_pad2d.default, aten.reflection_pad2d_backward.default,
    aten.replication_pad2d.default, aten.replication_pad2d_backward.default,
    aten.reflection_pad1d.default, aten.reflection_pad1d_backward.default,
    aten.reflection_pad3d.default, aten.reflection_pad3d_backward.default,
    aten.replication_pad1d.default, aten.replication_pad1d_backward.default,
    aten.replication_pad3d.default, aten.replication_pad3d_backward.default,
    aten.adaptive_max_pool2d.default, aten.adaptive_max_pool2d_backward.default, aten.max_unpool2d.default,
    aten.upsample_linear1d.default, aten.upsample_linear1d_backward.default,
    aten.upsample_trilinear3d.default, aten.upsample_trilinear3d_backward.default,
    aten.upsample_nearest3d.default, aten.upsample_nearest3d_backward.default,
    aten._upsample_nearest_exact2d.default, aten._upsample_nearest_exact2d_backward.default,
    aten._upsample_bilinear2d_aa.default, aten._upsample_bilinear2d_aa_backward.default,
    aten._upsample_bicubic2d_aa.default, aten._upsample_bicubic2d_aa_backward.default,
    aten.grid_sampler_2d.default, aten.grid_sampler_2d_backward.default,
    aten.grid_sampler_3d.default, aten.grid_sampler_3d_backward.default,
)  # fmt: skip

# Channels and pixels change into each other: without a batch there is nothing that is free.
_REARRANGED = (
    aten.pixel_shuffle.default, aten.pixel_unshuffle.default, aten.channel_shuffle.default,
    aten.im2col.default, aten.col2im.default,
)  # fmt: skip

RULES: dict[torch._ops.OpOverload, Rule] = {
    **dict.fromkeys(
        (
            aten._softmax.default,
            aten._safe_softmax.default,
            aten._log_softmax.default,
            aten._safe_softmax.default,
            aten._softmax_backward_data.default,
            aten._log_softmax_backward_data.default,
            aten.glu.default,
            aten.glu_backward.default,
        ),
        along,
    ),
    **dict.fromkeys(
        (
            aten.native_layer_norm.default,
            aten.native_layer_norm_backward.default,
            aten._fused_rms_norm.default,
            aten._fused_rms_norm_backward.default,
        ),
        trailing_norm,
    ),
    **dict.fromkeys((aten.native_group_norm.default, aten.native_group_norm_backward.default), group_norm),
    **dict.fromkeys((aten.convolution.default, aten.convolution_backward.default), convolution),
    **dict.fromkeys(
        (
            aten.native_batch_norm.default,
            aten._native_batch_norm_legit_functional.default,
            aten._native_batch_norm_legit_no_training.default,
        ),
        batch_norm_inference,
    ),
    aten.native_batch_norm_backward.default: batch_norm_backward,
    **dict.fromkeys(_SAMPLEWISE, by_sample),
    **dict.fromkeys(_REARRANGED, rearranged),
    **dict.fromkeys((aten._cdist_forward.default, aten._cdist_backward.default), distances),
    **dict.fromkeys((moai.sdpa.default, moai.sdpa_backward.default), attention),
    moai.repeat_heads.default: repeat_heads,
    moai.sum_heads.default: sum_heads,
    moai.class_loss.default: part_of_class_loss,
    moai.class_weight.default: class_weight,
    moai.class_loss_backward.default: part_of_class_loss_backward,
    **dict.fromkeys((aten.nll_loss_forward.default, aten.nll_loss2d_forward.default), class_loss),
    **dict.fromkeys((aten.nll_loss_backward.default, aten.nll_loss2d_backward.default), class_loss_backward),
}
