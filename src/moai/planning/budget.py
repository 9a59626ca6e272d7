"""How much of a device's memory a plan may use: what is predicted is not what an allocator makes of it.

In: MOREH_ADVANCED_PARALLELIZATION_MEMORY_USAGE_CORRECTION_RATIO. Out: bytes.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

RATIO = "MOREH_ADVANCED_PARALLELIZATION_MEMORY_USAGE_CORRECTION_RATIO"
_DEFAULT_RATIO = 80  # percent


def budget(memory_bytes: int, environ: Mapping[str, str] = os.environ) -> int:
    """Bytes that a plan may use of a device with `memory_bytes`. ValueError where the variable makes no sense."""
    text = environ.get(RATIO) or str(_DEFAULT_RATIO)
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 100):
        raise ValueError(
            f"{RATIO}={text}: a percentage of a device's memory is expected, a whole number from 1 to 100. Correct it, "
            f"or unset it to use {_DEFAULT_RATIO}."
        )
    return memory_bytes * int(text) // 100
