"""Operators on tensors without data, where torch's own meta kernels refuse what its real ones do, or there are none.

In: an operator. Out: what to call on meta tensors in its stead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import moai.graph.ops  # noqa: F401  (registers torch.ops.moai)


def meta_kernel(op: torch._ops.OpOverload) -> Callable[..., Any]:
    """`op`, or what stands for it on meta tensors."""
    return _OWN.get(op, op)


def _grouped_mm(
    a: torch.Tensor, b: torch.Tensor, offs: Any = None, bias: Any = None, out_dtype: torch.dtype | None = None
) -> torch.Tensor:
    """torch's own takes nothing but bf16."""
    if a.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(a.dtype)
    if a.dim() == b.dim() == 2:  # the groups are parts of the dim that is summed over
        size = [offs.shape[0], a.shape[0], b.shape[1]]
    elif b.dim() == 2:
        size = [a.shape[1], b.shape[1]]
    else:
        size = [*a.shape[:-1], b.shape[-1]]
    return torch.empty(size, dtype=out_dtype or a.dtype, device="meta")


def _random(size: Any, kind: str, a: float, b: float, seed: int, start: int, dtype: torch.dtype) -> torch.Tensor:
    """No argument says that there are no data: the numbers would really be drawn."""
    return torch.empty(size, dtype=dtype, device="meta")


def _randperm(n: int, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """The same."""
    return torch.empty(n, dtype=dtype, device="meta")


_OWN: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._grouped_mm.default: _grouped_mm,
    torch.ops.moai.random.default: _random,
    torch.ops.moai.randperm.default: _randperm,
}
