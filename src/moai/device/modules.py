"""Modules of torch that do something else on a device they know than elsewhere.

In: `torch.nn`. Out: its transformers without their fused inference, which is made for CUDA and nested tensors, and
weight norm without the graph of a weight that it computes anew before every use, which would hold the parameters when
the module is moved.
"""

from __future__ import annotations

import sys
from typing import Any

import torch


def install() -> None:
    """Call once."""
    torch.backends.mha.set_fastpath_enabled(False)
    # By its name, as `torch.nn.utils.weight_norm` is a function, too.
    kind: Any = sys.modules["torch.nn.utils.weight_norm"].WeightNorm  # type: ignore[attr-defined]
    apply = kind.apply

    def apply_detached(module: torch.nn.Module, name: str, dim: int) -> Any:
        hook = apply(module, name, dim)
        setattr(module, name, getattr(module, name).detach())
        return hook

    kind.apply = staticmethod(apply_detached)
