"""What the script has asked for by `torch.moreh.option.enable_advanced_parallelization`.

In: the script's `Options`. Out: the session asks for them when it chooses a plan.
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from moai.plan.options import Options

_current: Options | None = None


def current(environ: Mapping[str, str] = os.environ) -> Options | None:
    """The options in force; None if neither the script nor the environment asks for advanced parallelization."""
    if _current is None and environ.get("MOREH_ENABLE_ADVANCED_PARALLELIZATION") == "1":
        return Options()
    return _current


def enable(options: Options) -> None:
    """Puts `options` in force for the plan of this process, if it is not chosen yet."""
    global _current
    _current = options
