"""Device: one physical device of an accelerator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Device:
    """`index` among the visible devices of its kind; `threads` is the number of CPU threads of its worker."""

    kind: Literal["cpu", "cuda"]
    index: int
    memory_bytes: int
    threads: int
