"""Modules of torch that do something else on a device they know than elsewhere.

In: `torch.nn`. Out: its transformers without their fused inference, which is made for CUDA and nested tensors, and
weight norm without the graph of a weight that it computes anew before every use, which would hold the parameters when
the module is moved. What becomes a parameter or a buffer, or is loaded into a module or an optimizer, is no batch of
data, even if it was uploaded like one.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from moai.capture.values import lives_on


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
    _note_states()


def _note_states() -> None:
    make, register = torch.nn.Parameter.__new__, torch.nn.Module.register_buffer

    def parameter(cls: type, *args: Any, **kwargs: Any) -> Any:
        made: torch.Tensor = make(cls, *args, **kwargs)
        _keep(made)
        return made

    @functools.wraps(register)
    def register_buffer(
        self: torch.nn.Module, name: str, tensor: torch.Tensor | None, *args: Any, **kwargs: Any
    ) -> None:
        _keep(tensor)
        register(self, name, tensor, *args, **kwargs)

    torch.nn.Parameter.__new__ = staticmethod(parameter)  # type: ignore[assignment]
    torch.nn.Module.register_buffer = register_buffer  # type: ignore[method-assign]
    torch.nn.Module.load_state_dict = _keeping(torch.nn.Module.load_state_dict)  # type: ignore[method-assign]
    torch.optim.Optimizer.load_state_dict = _keeping(torch.optim.Optimizer.load_state_dict)  # type: ignore[method-assign]


def _keeping(load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load)
    def load_state_dict(self: Any, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        for leaf in tree_leaves(state_dict):
            _keep(leaf)
        return load(self, state_dict, *args, **kwargs)

    return load_state_dict


def _keep(x: Any) -> None:
    if isinstance(x, torch.Tensor) and x.device.type == "cuda":
        lives_on(x)
