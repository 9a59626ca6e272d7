"""Whether `cuda` is to be the accelerator after `import torch`, for a script that does not ask for it itself.

In: the environment, the user's choice of an accelerator. Cheap: `import torch` asks.
"""

from __future__ import annotations

import os
from collections.abc import Mapping


def wanted(environ: Mapping[str, str] = os.environ) -> bool:
    """MOAI_CUDA says so; else a forced plan or the original's switch for all programs does, or the user has chosen an
    accelerator."""
    said = environ.get("MOAI_CUDA")
    if said in ("0", "1"):
        return said == "1"
    if environ.get("MOAI_PLAN") or environ.get("MOREH_ENABLE_ADVANCED_PARALLELIZATION") == "1":
        return True
    from moai.platform import accelerators  # reads the database, which costs more than all of the above

    return accelerators.configured(environ)
