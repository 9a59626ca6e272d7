"""Shapes, strides and dtypes of a call's results, from torch's own meta kernels, remembered by the call's geometry."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch

from moai.capture.geometry import numel, span
from moai.capture.operators import Operator, functional_twin
from moai.graph.meta_kernels import meta_kernel

_META = torch.device("meta")
# Known results, of so many calls: a script whose shapes never come again would remember them all.
_MOST = 1 << 16
_results: dict[Any, Any] = {}


# The results' shapes depend on data, or the operator writes and has no functional form, or the call is wrong, which
# only running it can tell well.
UNKNOWN = object()


def is_dense(size: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether the elements fill their memory without gaps or overlap."""
    return span(size, stride) == numel(size) and (
        numel(size) < 2 or 0 not in [st for n, st in zip(size, stride, strict=True) if n > 1]
    )


def infer(operator: Operator, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What `operator` returns, as meta tensors (not to be modified), or UNKNOWN."""
    key = (operator.op, _key(args), _key(tuple(kwargs.items())))
    try:
        return _results[key]
    except KeyError:
        pass
    op, twin = operator.op, functional_twin(operator.op) if operator.mutated else None
    if operator.mutated and twin is None:
        return UNKNOWN
    if operator.is_out_variant and twin is not None:
        op, kwargs = twin, {k: v for k, v in kwargs.items() if k not in operator.mutated_names}
    meta_kwargs = {k: _to_meta(v) for k, v in kwargs.items() if k != "pin_memory"}
    if operator.takes_device:
        meta_kwargs["device"] = _META
    try:
        result = meta_kernel(op)(*[_to_meta(a) for a in args], **meta_kwargs)
    except (NotImplementedError, RuntimeError, IndexError, ValueError, TypeError):
        return UNKNOWN
    if op._schema.returns and not isinstance(result, (torch.Tensor, list, tuple)):
        return UNKNOWN
    if operator.output_mask is not None:
        result = tuple(r if wanted else None for r, wanted in zip(result, args[operator.output_mask], strict=True))
    if len(_results) >= _MOST:
        _results.clear()
    _results[key] = result
    return result


@lru_cache(_MOST)
def _meta_tensor(size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty_strided(size, stride, dtype=dtype, device=_META)


def _to_meta(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return _meta_tensor(tuple(arg.size()), arg.stride(), arg.dtype)
    if isinstance(arg, (list, tuple)):
        return [_to_meta(a) for a in arg]
    if isinstance(arg, torch.device):
        return _META
    return arg


def _key(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return tuple(arg.size()), arg.stride(), arg.dtype
    if isinstance(arg, (list, tuple)):
        return tuple([_key(a) for a in arg])
    return type(arg), arg
