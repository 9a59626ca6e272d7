"""The collectives of `lower.program`, on the tensors of one device.

In: local tensors. Out: fresh local tensors, bit-identical on all devices. Every device issues them in the same order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist

NAMES = frozenset({"all_reduce", "all_reduce_start", "wait", "all_gather"})

# A last resort only: the controller notices a stuck collective much earlier, and it knows slow from stuck.
TIMEOUT = timedelta(minutes=30)

_SUMMABLE = frozenset(
    {
        torch.uint8, torch.int8, torch.int32, torch.int64,
        torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64,
    }
)  # fmt: skip


class Collectives(Protocol):
    """What an executor needs of the other devices."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over devices, in a fresh tensor of x's shape."""

    def all_reduce_start(self, xs: Sequence[torch.Tensor]) -> Any:
        """Begin to sum `xs` (one dtype) over devices; returns a handle for `wait`. The xs may be freed at once."""

    def wait(self, handle: Any) -> tuple[torch.Tensor, ...]:
        """The sums, in the order and shapes of the start's xs."""

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        """The devices' parts, device r's of length sizes[r] along `dim`, concatenated."""


class Alone:
    """The collectives of an accelerator with one device: identities, but for the fresh result."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    def all_reduce_start(self, xs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        return tuple(x.clone() for x in xs)

    def wait(self, handle: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return handle

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        return x.clone()


@dataclass(frozen=True, slots=True)
class _Reduction:
    work: dist.Work
    flat: torch.Tensor
    shapes: tuple[torch.Size, ...]


class Group:
    """Collectives over `torch.distributed`'s default group: gloo for CPU devices, NCCL for GPUs."""

    def __init__(self, device: torch.device, rank: int, size: int, store: dist.Store) -> None:
        """Meets the `size - 1` other devices at `store`; blocks until all are there."""
        dist.init_process_group(
            "gloo" if device.type == "cpu" else "nccl",
            store=store,
            rank=rank,
            world_size=size,
            timeout=TIMEOUT,
            device_id=None if device.type == "cpu" else device,
        )
        self._size = size

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        total = _summable(x).clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    def all_reduce_start(self, xs: Sequence[torch.Tensor]) -> _Reduction:
        flat = torch.cat([_summable(x).reshape(-1) for x in xs])
        work = dist.all_reduce(flat, async_op=True)
        return _Reduction(work, flat, tuple(x.shape for x in xs))

    def wait(self, handle: _Reduction) -> tuple[torch.Tensor, ...]:
        handle.work.wait()
        parts = handle.flat.split([shape.numel() for shape in handle.shapes])
        return tuple(part.view(shape) for part, shape in zip(parts, handle.shapes, strict=True))

    def all_gather(self, x: torch.Tensor, dim: int, sizes: Sequence[int]) -> torch.Tensor:
        # Backends gather equal parts only, so every part is padded to the longest one.
        longest = max(sizes)
        shape = [*x.shape[:dim], longest, *x.shape[dim + 1 :]]
        if x.shape[dim] == longest:
            mine = x.contiguous()
        else:
            mine = x.new_zeros(shape)
            mine.narrow(dim, 0, x.shape[dim]).copy_(x)
        parts = x.new_empty((self._size, *shape))
        if parts.numel():
            # As bytes: gathering does not compute, and backends know fewer dtypes than PyTorch.
            dist.all_gather_single(parts.view(-1).view(torch.uint8), mine.view(-1).view(torch.uint8))
        if dim == 0 and len(set(sizes)) == 1:
            return parts.flatten(0, 1)
        return torch.cat([part.narrow(dim, 0, n) for part, n in zip(parts, sizes, strict=True)], dim)


def _summable(x: torch.Tensor) -> torch.Tensor:
    if x.dtype not in _SUMMABLE:
        raise TypeError(f"{x.dtype} tensors cannot be summed over devices: convert to one of {_names(_SUMMABLE)} first")
    return x


def _names(dtypes: frozenset[torch.dtype]) -> str:
    return ", ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))
