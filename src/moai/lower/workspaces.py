"""What kernels work in beside their arguments and results, for those that need much.

In: an operator and its arguments, tensors as `Laid`. Out: bytes that are there only while it runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from moai.graph.ops import adds_up_repeated_heads
from moai.lower.layouts import Laid


def workspace(op: str, args: tuple[Any, ...]) -> int:
    """Bytes; 0 for operators that are not known to need any."""
    found = _WORKSPACES.get(op)
    return 0 if found is None else found(*args)


def _sdpa(q: Laid, k: Laid, v: Laid, mask: Laid | None, *_: Any) -> int:
    """A mask of another dtype is made a bias."""
    if mask is None or mask.dtype == q.dtype:
        return 0
    bias = math.prod(mask.shape) * q.dtype.itemsize
    return bias + mask.nbytes if mask.dtype == torch.bool else bias


def _sdpa_backward(
    grad: Laid, q: Laid, k: Laid, v: Laid, out: Laid, lse: Laid, mask: Laid | None = None, *_: Any
) -> int:
    """Where shared key and value heads are repeated, so are their gradients."""
    repeated = (k.nbytes + v.nbytes) * q.shape[1] // k.shape[1] if adds_up_repeated_heads(q, k) else 0
    return _sdpa(q, k, v, mask) + 2 * repeated


def _embedding(weight: Laid, indices: Laid, start: int) -> int:
    """Rows are looked up before those that are not here become zeros."""
    return math.prod(indices.shape) * math.prod(weight.shape[1:]) * weight.dtype.itemsize


def _embedding_backward(grad: Laid, *_: Any) -> int:
    return grad.nbytes


def _rows_mm(x: Laid, weights: Laid, ids: Laid) -> int:
    """Rows are sorted by their matrices, and so is what comes out at first."""
    made = x.shape[0] * weights.shape[-1] * x.dtype.itemsize
    return x.nbytes + made + 2 * ids.nbytes


def _rows_outer(x: Laid, y: Laid, ids: Laid, n: int) -> int:
    return x.nbytes + y.nbytes + 2 * ids.nbytes


def _product(*tensors: Any) -> int:
    """In halves, transposed factors are copied."""
    halves = [x for x in tensors if isinstance(x, Laid) and x.dtype.itemsize == 2 and len(x.shape) > 1]
    return sum(x.nbytes for x in halves if x.stride[-1] != 1)


def _batched_product(*tensors: Laid) -> int:
    """Factors whose batch dims cannot be seen as one are copied."""
    return sum(x.nbytes for x in tensors if not _flattens(x)) + _product(*tensors)


def _flattens(x: Laid) -> bool:
    batch = [(s, n) for s, n in zip(x.stride[:-2], x.shape[:-2], strict=True) if n != 1]
    return all(outer == inner * n for (outer, _), (inner, n) in pairwise(batch))


def _sum(x: Laid, *_: Any) -> int:
    """Halves are added up in float32, all of them cast at first."""
    return 2 * x.nbytes if x.dtype.itemsize == 2 and x.dtype.is_floating_point else 0


def _dropout_backward(grad: Laid, *_: Any) -> int:
    return grad.nbytes


def _mixed(a: Any, b: Any, *_: Any) -> int:
    """On a CPU, what is not in the dtype of the calculation is cast first."""
    if not isinstance(b, Laid) or a.dtype == b.dtype:
        return 0
    common = torch.promote_types(a.dtype, b.dtype)
    return sum(math.prod(x.shape) * common.itemsize for x in (a, b) if x.dtype != common)


_WORKSPACES: dict[str, Callable[..., int]] = {
    "moai.sdpa.default": _sdpa,
    "moai.sdpa_backward.default": _sdpa_backward,
    "moai.embedding.default": _embedding,
    "moai.embedding_backward.default": _embedding_backward,
    "moai.rows_mm.default": _rows_mm,
    "moai.rows_outer.default": _rows_outer,
    "aten.sum.dim_IntList": _sum,
    "aten.mm.default": _product,
    "aten.mm.out": _product,
    "aten.addmm.default": _product,
    "moai.matmul.default": _batched_product,
    "aten.native_dropout_backward.default": _dropout_backward,
    **{f"aten.{name}.Tensor": _mixed for op in ("add", "sub", "mul", "div") for name in (op, f"{op}_")},
}
