"""Device: one physical device of an accelerator, as the pool hands it out and the runtime uses it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Device:
    """A GPU (`kind` "cuda": CUDA or ROCm), or a CPU worker process with `threads` threads and a memory budget.

    `index` tells devices of one host apart: the GPU's number, or which group of `threads` cores a CPU worker takes.
    """

    kind: Literal["cpu", "cuda"]
    index: int
    memory_bytes: int
    threads: int

    @property
    def torch_name(self) -> str:
        """What the worker that owns the device calls it in PyTorch."""
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"

    def __str__(self) -> str:
        return f"{self.kind}:{self.index}"
