"""How results lie in memory: strides, and which argument's memory they share; torch's own answer, remembered.

In: an operator and its arguments, tensors as `Laid`. Out: its results as `Result`s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from moai.graph.step_graph import map_args
from moai.lower import on_meta
from moai.lower.held_memory import memory_of

_MOST = 1 << 14  # answers that are remembered


@dataclass(frozen=True, slots=True)
class Laid:
    """A tensor's shape, strides and dtype. `nbytes` are those of its entries."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Result:
    """A result: in the memory of the `shares`-th tensor among the arguments, or (None) in `nbytes` of its own."""

    laid: Laid
    shares: int | None
    nbytes: int


_known: dict[Any, Any] = {}


def dense(shape: tuple[int, ...], dtype: torch.dtype) -> Laid:
    """A tensor whose entries follow each other."""
    return Laid(shape, _strides(shape), dtype)


def results(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`Result`s, nested as the operator nests what it returns. Raises what the operator does on such arguments."""
    key = (op, _key(args), _key(kwargs))
    found = _known.get(key)
    if found is None:
        if len(_known) >= _MOST:
            _known.clear()
        found = _known[key] = _ask(op, args, kwargs)
    return found


def _ask(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    given: list[torch.Tensor] = []

    def tensor(leaf: Any) -> Any:
        if not isinstance(leaf, Laid):
            return leaf
        given.append(_meta(leaf))
        return given[-1]

    found = on_meta.run(op, map_args(args, tensor), map_args(kwargs, tensor))
    memory = {memory_of(x): k for k, x in enumerate(given)}

    def result(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return None
        return Result(_laid(leaf), memory.get(memory_of(leaf)), leaf.untyped_storage().nbytes())

    return map_args(found, result)


def _meta(x: Laid) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta")


def _laid(x: torch.Tensor) -> Laid:
    return Laid(tuple(x.shape), x.stride(), x.dtype)


@cache
def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return torch.empty(shape, device="meta").stride()


def _key(arg: Any) -> Any:
    """Tells 1 from 1.0 and True."""
    if isinstance(arg, (tuple, list)):
        return tuple(map(_key, arg))
    if isinstance(arg, dict):
        return tuple((name, _key(a)) for name, a in arg.items())
    return arg if isinstance(arg, Laid) else (type(arg), arg)
