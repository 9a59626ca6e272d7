"""Clock: how long each instruction of a run takes a device.

In: `tick` behind every instruction, which generated code calls. Out: seconds, in the order of the calls. A GPU's are
those between events in its stream, so that instructions are timed where they are done, and not where they are called.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """For one run at a time, which `start` begins."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stamps: list[Any] = []
        self.tick: Callable[[], None] = self._record if self._on_gpu else self._read

    def start(self) -> None:
        self._stamps.clear()
        self.tick()

    def seconds(self) -> list[float]:
        """Between each tick and the one before it. A GPU's work has to be over."""
        pairs = zip(self._stamps, self._stamps[1:], strict=False)
        if self._on_gpu:
            return [a.elapsed_time(b) * 1e-3 for a, b in pairs]
        return [b - a for a, b in pairs]

    def _read(self) -> None:
        self._stamps.append(time.perf_counter())

    def _record(self) -> None:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._stamps.append(event)
