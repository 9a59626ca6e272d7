"""`torch.cuda.FloatTensor` and the other tensor types of before `dtype`, which scripts still say.

In: the names in `torch.cuda`, `Tensor.type(...)`, `torch.set_default_tensor_type`. Out: the same with the
accelerator's tensors: the types make tensors, are answered by `isinstance`, and cast.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

_DTYPES = {
    "FloatTensor": torch.float32,
    "DoubleTensor": torch.float64,
    "HalfTensor": torch.float16,
    "BFloat16Tensor": torch.bfloat16,
    "ByteTensor": torch.uint8,
    "CharTensor": torch.int8,
    "ShortTensor": torch.int16,
    "IntTensor": torch.int32,
    "LongTensor": torch.int64,
    "BoolTensor": torch.bool,
}


class _TensorType(type):
    """The type of such a type. `dtype` is that of its tensors."""

    dtype: torch.dtype

    def __call__(cls, *args: Any) -> torch.Tensor:
        """From lengths of dims, a torch.Size, numbers in lists, or a tensor."""
        if len(args) == 1 and isinstance(args[0], torch.Tensor):
            return args[0].to(device="cuda", dtype=cls.dtype)
        if len(args) == 1 and not isinstance(args[0], (int, torch.Size)):
            return torch.tensor(args[0], dtype=cls.dtype, device="cuda")
        return torch.empty(*(args or (0,)), dtype=cls.dtype, device="cuda")

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, torch.Tensor) and instance.is_cuda and instance.dtype == cls.dtype

    def __repr__(cls) -> str:
        return f"<class 'torch.cuda.{cls.__name__}'>"


TYPES = {name: _TensorType(name, (), {"dtype": dtype, "__module__": "torch.cuda"}) for name, dtype in _DTYPES.items()}


def install() -> None:
    """Puts the types into `torch.cuda`. Call once, after `tensors.install`."""
    for name, type_ in TYPES.items():
        setattr(torch.cuda, name, type_)
    torch.Tensor.type = _type(torch.Tensor.type)  # type: ignore[method-assign, assignment]
    torch.set_default_tensor_type = _set_default(torch.set_default_tensor_type)


def _named(type_: Any) -> Any:
    """One of the types here for its name."""
    if isinstance(type_, str) and type_.startswith("torch.cuda."):
        return TYPES.get(type_.removeprefix("torch.cuda."), type_)
    return type_


def _type(type_: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(type_)
    def call(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        wanted = _named(dtype)
        if isinstance(wanted, _TensorType):
            return self.to(device="cuda", dtype=wanted.dtype)
        return type_(self, *(() if dtype is None else (dtype,)), *args, **kwargs)

    return call


def _set_default(set_default: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(set_default)
    def call(t: Any) -> None:
        wanted = _named(t)
        if isinstance(wanted, _TensorType):
            torch.set_default_dtype(wanted.dtype)
            torch.set_default_device("cuda")
        else:
            torch.set_default_device(None)
            set_default(t)

    return call
