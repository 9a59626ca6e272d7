"""Operators that are called often, as PyTorch's own functions: the same kernels without the way through `torch.ops`,
which reads the operator's schema at every call and takes 1.5 us longer.

In: what an instruction calls. Out: what generated code calls for it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

aten = torch.ops.aten

# Only where every call of the operator is a call of the function as it stands.
_FUNCTIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.add_.Tensor: torch.Tensor.add_,
    aten.addmm.default: torch.addmm,
    aten.copy_.default: torch.Tensor.copy_,
    aten.mm.default: torch.mm,
    aten.mm.out: torch.mm,
    aten.mul.Tensor: torch.mul,
    aten.mul_.Tensor: torch.Tensor.mul_,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reshape.default: torch.reshape,
}


def direct(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function that does the same sooner; `function` itself if none is known."""
    return _FUNCTIONS.get(function, function)
