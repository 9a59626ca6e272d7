"""How results lie in memory: strides, and which argument's memory they share; torch's own answer.

In: an operator and its arguments, tensors as `Laid`. Out: its results as `Result`s.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import torch

from moai.graph.step_graph import map_args
from moai.lower import on_meta
from moai.lower.held_memory import memory_of


@dataclass(frozen=True, eq=False)
class Laid:
    """A tensor's shape, strides and dtype. `nbytes` are those of its entries. There is one object for all tensors that
    lie alike (`dense`, `results`), so that comparing them takes no time."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @cached_property
    def nbytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class Result:
    """A result: in the memory of the `shares`-th tensor among the arguments, or (None) in `nbytes` of its own."""

    laid: Laid
    shares: int | None
    nbytes: int


_laid = cache(Laid)


@cache
def dense(shape: tuple[int, ...], dtype: torch.dtype) -> Laid:
    """A tensor whose entries follow each other."""
    return _laid(shape, torch.empty(shape, device="meta").stride(), dtype)


def results(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`Result`s, nested as the operator nests what it returns. Raises what the operator does on such arguments."""
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
        return Result(
            _laid(tuple(leaf.shape), leaf.stride(), leaf.dtype),
            memory.get(memory_of(leaf)),
            leaf.untyped_storage().nbytes(),
        )

    return map_args(found, result)


def _meta(x: Laid) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride, dtype=x.dtype, device="meta")
