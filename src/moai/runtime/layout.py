"""How a tensor lies: what code is compiled for."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Layout:
    """A tensor's shape, strides and dtype."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: torch.Tensor) -> Layout:
        return Layout(tuple(x.shape), x.stride(), x.dtype)
