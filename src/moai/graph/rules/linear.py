"""Operators that commute with the sum of a Partial: applied to every term, they give the terms of the result.

A Partial may wait behind such operators, so that it is summed once, and late.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moai.graph.rules.dims import Call
from moai.graph.step_graph import Ref, TensorType

aten = torch.ops.aten

# f(a, b, ...) with every tensor a Partial is a Partial.
JOINTLY = frozenset(
    {
        aten.add.Tensor, aten.sub.Tensor, aten.neg.default,
        aten.sum.default, aten.sum.dim_IntList, aten.mean.default, aten.mean.dim,
        aten.reshape.default, aten.permute.default, aten.unsqueeze.default,
        aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims, aten.expand.default, aten.slice.Tensor,
        aten.select.int, aten.split.Tensor, aten.split_with_sizes.default, aten.unsafe_split.Tensor,
        aten.unsafe_split_with_sizes.default, aten.unbind.int, aten.slice_backward.default,
        aten.select_backward.default, aten.cat.default, aten.stack.default, aten.flip.default,
        aten.slice_scatter.default, aten.select_scatter.default,
        aten._foreach_add.List, aten._foreach_sub.List, aten._foreach_neg.default,
    }
)  # fmt: skip

# One factor is a Partial, the other one whole.
BILINEAR = frozenset(
    {aten.mul.Tensor, aten.mul.Scalar, aten._foreach_mul.List, aten._foreach_mul.Scalar, aten._foreach_mul.ScalarList,
     aten._foreach_mul.Tensor}
)  # fmt: skip

# The first tensor is a Partial, the divisor whole.
QUOTIENTS = frozenset(
    {aten.div.Tensor, aten.div.Scalar, aten._foreach_div.List, aten._foreach_div.Scalar, aten._foreach_div.ScalarList,
     aten._foreach_div.Tensor}
)  # fmt: skip


def keeps_partial(
    op: torch._ops.OpOverload, inputs: Sequence[TensorType], outputs: Sequence[TensorType], partial: Sequence[bool]
) -> bool:
    """Whether `op` of tensors of which `partial` tells the Partial ones may run term by term.

    Not where that would grow what is to be summed, nor where a term would be rounded to a narrower type first.
    """
    if sum(t.numel for t in outputs) > sum(t.numel for t, p in zip(inputs, partial, strict=True) if p):
        return False
    exact = all(o.dtype.is_floating_point and not _narrows(inputs, o) for o in outputs)
    if op in JOINTLY or op is aten._to_copy.default:
        return exact and all(partial)
    if op in BILINEAR:
        return exact and sum(partial) == 1
    return op in QUOTIENTS and exact and partial[0] and not any(partial[1:])


def adds_a_number(call: Call) -> bool:
    """add(x, 1): the number would be added once for each term."""
    return call.op in (aten.add.Tensor, aten.sub.Tensor) and not (
        isinstance(call["self"], Ref) and isinstance(call["other"], Ref)
    )


def _narrows(inputs: Sequence[TensorType], out: TensorType) -> bool:
    return any(t.dtype.is_floating_point and t.dtype.itemsize > out.dtype.itemsize for t in inputs)
