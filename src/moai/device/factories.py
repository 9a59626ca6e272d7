"""Functions that make tensors: `torch.zeros(..., device="cuda")` and so on.

In: a device as a string, which C++ would parse into the CUDA that is not there, and `pin_memory`, for which this
device has no allocator. Out: the same calls with the accelerator's device and pageable memory.

Not every such call needs it: kernels stand under C++'s "CUDA" too. It is for those that set the current device first
(`torch.tensor`), for `device="cuda:1"`, for tensors that are on the accelerator already (`torch.as_tensor` returns
them as they are) and for `pin_memory=True` (safetensors, `torch.autograd.graph.save_on_cpu`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._device import _device_constructors

from moai.device.tensors import named

_LIKE = ("empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like")
_NEW = ("new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros")


def install() -> None:
    """Wraps the factories of torch. Call once, after `torch_device.install`."""
    # Torch lists and caches the functions that obey a default device, and knows them by identity: it must see its own.
    constructors = {id(function) for function in _device_constructors()}
    for module in (torch, torch.fft):
        names = [name for name, value in vars(module).items() if id(value) in constructors or name in _LIKE]
        for name in names:
            setattr(module, name, _wrapped(getattr(module, name)))
    for name in _NEW:
        setattr(torch.Tensor, name, _wrapped(getattr(torch.Tensor, name)))


def _wrapped(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def make(*args: Any, **kwargs: Any) -> torch.Tensor:
        if "device" in kwargs:
            kwargs["device"] = named(kwargs["device"])
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return make
