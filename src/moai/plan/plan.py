"""Plan: how one StepGraph is spread over an accelerator's devices.

In: the number of devices of the accelerator. Out: read by `lower`.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    """`dp`: how many devices share the global batch; every one holds all parameters and optimizer states."""

    dp: int

    def __post_init__(self) -> None:
        if self.dp < 1:
            raise ValueError(f"a plan needs at least one device, got dp={self.dp}")
