"""Rules of reductions.

A sum over a split dim is left in terms; of a maximum, the maximum over devices is taken. Any other reduction needs its
dims whole. Means over split dims are taken apart by `lower` (a sum, divided by the global count) before they get here.
"""

from __future__ import annotations

import torch

from moai.graph.rules.dims import Call, Dims, Rule

aten = torch.ops.aten


def reduced_dims(call: Call) -> tuple[int, ...]:
    """The dims that the reduction `call` goes over."""
    return call.dims("dim", len(call.inputs[0].shape))


def reduction(call: Call) -> Dims:
    rank, gone = len(call.inputs[0].shape), reduced_dims(call)
    free = tuple(None if d in gone else d for d in range(rank))
    return Dims((free,), (_kept(call, rank, gone),) * len(call.outputs))


def sum_(call: Call) -> Dims:
    rank, gone = len(call.inputs[0].shape), reduced_dims(call)
    return Dims((tuple(range(rank)),), (_kept(call, rank, gone),), summed=frozenset(gone))


def maximum(call: Call) -> Dims:
    rank, gone = len(call.inputs[0].shape), reduced_dims(call)
    return Dims((tuple(range(rank)),), (_kept(call, rank, gone),), maxed=frozenset(gone))


def _kept(call: Call, rank: int, gone: tuple[int, ...]) -> tuple[int | None, ...]:
    if call.args.get("keepdim"):
        return tuple(None if d in gone else d for d in range(rank))
    return tuple(d for d in range(rank) if d not in gone)


_SUMS = (aten.sum.default, aten.sum.dim_IntList, aten.nansum.default, aten.count_nonzero.default,
         aten.count_nonzero.dim_IntList)  # fmt: skip

_OTHERS = (
    aten.mean.default, aten.mean.dim, aten.amin.default, aten.aminmax.default,
    aten.max.default, aten.max.dim, aten.min.default, aten.min.dim, aten.argmax.default, aten.argmin.default,
    aten.any.default, aten.any.dim, aten.any.dims, aten.all.default, aten.all.dim, aten.all.dims,
    aten.prod.default, aten.prod.dim_int, aten.logsumexp.default, aten.linalg_vector_norm.default,
    aten.var.default, aten.var.dim, aten.var.correction, aten.std.default, aten.std.dim, aten.std.correction,
    aten.var_mean.correction, aten.std_mean.correction, aten.median.dim, aten.mode.default,
    aten.nanmedian.dim, aten.kthvalue.default, aten.norm.ScalarOpt_dim, aten.norm.ScalarOpt_dim_dtype,
)  # fmt: skip

RULES: dict[torch._ops.OpOverload, Rule] = {
    **dict.fromkeys(_SUMS, sum_),
    **dict.fromkeys(_OTHERS, reduction),
    aten.amax.default: maximum,
}
