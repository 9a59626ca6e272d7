"""Rules of operators that work entry by entry: every dim of the result may be split."""

from __future__ import annotations

import torch

from moai.graph.rules.dims import Call, DimFactors, Dims, Rule
from moai.graph.step_graph import TensorType

aten = torch.ops.aten

# Entry by entry, but not tagged so by PyTorch.
_UNTAGGED = (
    aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar, aten.masked_fill.Tensor,
    aten._to_copy.default, aten.copy.default, aten.fill.Tensor,
    aten.hardtanh_backward.default, aten.leaky_relu_backward.default, aten.softplus_backward.default,
    aten.elu_backward.default, aten.softshrink_backward.default, aten.hardshrink_backward.default,
    aten.hardsigmoid_backward.default, aten.hardswish_backward.default, aten.mish_backward.default,
    aten.log_sigmoid_backward.default, aten.isclose.default, aten._conj.default, aten.real.default,
    aten.imag.default, aten.log_sigmoid_forward.default, aten.hardswish.default, aten._prelu_kernel.default,
    aten._prelu_kernel_backward.default, aten.polar.default, aten.complex.default,
)  # fmt: skip

# Losses and their backwards, which take a `reduction`.
_LOSSES = (
    aten.mse_loss.default, aten.smooth_l1_loss.default, aten.huber_loss.default, aten.binary_cross_entropy.default,
    aten.binary_cross_entropy_with_logits.default, aten.soft_margin_loss.default,
    aten.mse_loss_backward.default, aten.smooth_l1_loss_backward.default, aten.huber_loss_backward.default,
    aten.binary_cross_entropy_backward.default, aten.soft_margin_loss_backward.default,
)  # fmt: skip

_MEAN = 1


def broadcast(tensor: TensorType, out: TensorType) -> DimFactors:
    """The factors of `tensor`'s dims when it is broadcast to `out`, whose dim d runs over factor d."""
    lead = len(out.shape) - len(tensor.shape)
    return tuple(
        d + lead if d + lead >= 0 and size == out.shape[d + lead] else None for d, size in enumerate(tensor.shape)
    )


def pointwise(call: Call) -> Dims | None:
    out = call.outputs[0]
    if any(o.shape != out.shape for o in call.outputs):
        return None
    own = tuple(range(len(out.shape)))
    return Dims(tuple(broadcast(t, out) for t in call.inputs), (own,) * len(call.outputs))


def loss(call: Call) -> Dims | None:
    """An entry-by-entry loss, or its backward. A mean needs the global count: `lower` has divided it out before."""
    if call["reduction"] == _MEAN:
        return None
    wide = max(call.inputs, key=lambda t: (len(t.shape), t.numel))
    own = tuple(range(len(wide.shape)))
    inputs = tuple(broadcast(t, wide) for t in call.inputs)
    if call.outputs[0].shape == wide.shape:
        return Dims(inputs, (own,))
    return Dims(inputs, ((),), summed=frozenset(own))


RULES: dict[torch._ops.OpOverload, Rule] = dict.fromkeys(_UNTAGGED, pointwise) | dict.fromkeys(_LOSSES, loss)
