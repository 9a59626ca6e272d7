"""`torch.compile` for the accelerator's tensors.

In: a script's `torch.compile(...)`. Out: the same module or function, with the names of its parameters that
`torch.compile` gives them, run operator by operator: the accelerator sees the whole step, and compiles it for its
devices (MOAI_COMPILE).
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch

logger = logging.getLogger("moai")


def install() -> None:
    """Wraps `torch.compile`. Dynamo, which takes seconds to import, waits for the first call."""
    compile_ = torch.compile

    @functools.wraps(compile_)
    def compile(*args: Any, **kwargs: Any) -> Any:
        _leave_to_the_accelerator()
        return compile_(*args, **kwargs)

    torch.compile = compile


@functools.cache
def _leave_to_the_accelerator() -> None:
    torch.compiler.set_stance("force_eager")
    logger.debug("torch.compile: steps are compiled by the accelerator; the script's functions run as they are.")
