"""The accelerator's memory as `torch.cuda` reports it.

In: the session's figures. Out: bytes on the accelerator as a whole, the sum over its physical devices. Nothing is
cached between tensors, so what is reserved is what is allocated.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from typing import Any

from moai.device import owner

# torch.accelerator has functions of these names; its own need an allocator written in C++
GENERIC = (
    *("empty_cache", "memory_stats", "memory_allocated", "max_memory_allocated", "memory_reserved"),
    *("max_memory_reserved", "reset_peak_memory_stats", "reset_accumulated_memory_stats"),
)
__all__ = [
    *GENERIC,
    "get_allocator_backend",
    "list_gpu_processes",
    "max_memory_cached",
    "mem_get_info",
    "memory_cached",
    "memory_stats_as_nested_dict",
    "memory_summary",
    "reset_max_memory_allocated",
    "reset_max_memory_cached",
    "set_per_process_memory_fraction",
]


_peak_at_reset = 0


def _figures() -> tuple[int, int, int]:
    """Bytes: used, the most ever used, and all there are."""
    return owner.current().memory()


def memory_allocated(device: Any = None) -> int:
    return _figures()[0]


def max_memory_allocated(device: Any = None) -> int:
    """The most bytes in use since the peak was reset.

    The devices keep one peak for the whole run: one that stayed below an earlier one counts as what is in use now.
    """
    used, peak, _ = _figures()
    return peak if peak > _peak_at_reset else used


def mem_get_info(device: Any = None) -> tuple[int, int]:
    """Bytes: free, and all there are."""
    used, _, total = _figures()
    return total - used, total


memory_reserved = memory_cached = memory_allocated
max_memory_reserved = max_memory_cached = max_memory_allocated


def reset_peak_memory_stats(device: Any = None) -> None:
    global _peak_at_reset
    _peak_at_reset = _figures()[1]


reset_max_memory_allocated = reset_max_memory_cached = reset_peak_memory_stats


def reset_accumulated_memory_stats(device: Any = None) -> None:
    pass


def empty_cache() -> None:
    pass


def set_per_process_memory_fraction(fraction: float, device: Any = None) -> None:
    """Checked and ignored: the planner decides how much of each device's memory is used."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"Invalid fraction value: {fraction}. Allowed range: 0~1")


def get_allocator_backend() -> str:
    return "native"


def memory_stats(device: Any = None) -> dict[str, Any]:
    """The figures under the names that torch's own allocator has for them."""
    used, peak = memory_allocated(), max_memory_allocated()
    names = ("allocated_bytes", "reserved_bytes", "active_bytes", "requested_bytes")
    stats: dict[str, Any] = OrderedDict()
    for name in names:
        stats |= {f"{name}.all.current": used, f"{name}.all.peak": peak}
    return stats | {"num_alloc_retries": 0, "num_ooms": 0}


def memory_stats_as_nested_dict(device: Any = None) -> dict[str, Any]:
    used, peak = memory_allocated(), max_memory_allocated()
    return {"allocated_bytes": {"all": {"current": used, "peak": peak}}}


def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
    used, peak, total = _figures()
    rows = (("in use", used), ("in use at most", peak), ("total", total))
    return "\n".join(f"{name:<16}{size / 2**20:>12,.1f} MiB" for name, size in rows)


def list_gpu_processes(device: Any = None) -> str:
    return f"GPU:0\nprocess {os.getpid():>10d} uses {memory_allocated() / 2**20:>12.3f} MB GPU memory"
