"""Which values lie in the same memory.

In: tensors, with or without data, and who holds each. Out: who else holds entries of them.
"""

from __future__ import annotations

from collections.abc import Hashable

import torch


class HeldMemory:
    """Tensors by the memory that they lie in; a holder has one tensor."""

    def __init__(self) -> None:
        self._held: dict[int, dict[Hashable, torch.Tensor]] = {}

    def hold(self, holder: Hashable, x: torch.Tensor) -> None:
        """`x` stays alive until it is released."""
        self._held.setdefault(memory_of(x), {})[holder] = x

    def release(self, holder: Hashable, x: torch.Tensor) -> None:
        memory = memory_of(x)
        holders = self._held[memory]
        del holders[holder]
        if not holders:
            del self._held[memory]

    def others(self, holder: Hashable, x: torch.Tensor) -> list[Hashable]:
        """All but `holder` whose tensors lie between the first and the last entry of `x`."""
        holders = self._held.get(memory_of(x), {})
        begin, end = _span(x)
        found = []
        for other, y in holders.items():
            if other != holder:
                first, last = _span(y)
                if first < end and begin < last:
                    found.append(other)
        return found


def memory_of(x: torch.Tensor) -> int:
    """A number that tensors have in common exactly if they share memory (while one of them lives)."""
    return x.untyped_storage()._cdata


def _span(x: torch.Tensor) -> tuple[int, int]:
    """The bytes from the first to behind the last entry."""
    if not x.numel():
        return 0, 0
    first = int(x.storage_offset())
    last = first + sum((int(n) - 1) * int(step) for n, step in zip(x.shape, x.stride(), strict=True))
    return first * x.itemsize, (last + 1) * x.itemsize
