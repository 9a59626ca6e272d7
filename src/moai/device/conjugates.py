"""Conjugated and negated views: tensors of which a bit says that their memory holds the conjugate, or the negative.

In: kernels of the operators that torch hands such tensors to as they are. Out: the same kernels, given tensors whose
memory holds their values. For all other operators torch has done this before they get here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

Kernel = Callable[..., Any]

# These make or resize memory, look at a tensor's metadata alone, or change its memory as they change its values.
_INDIFFERENT = (
    *("empty", "set_", "resize_", "full_like", "as_strided", "view", "unfold", "_reshape_alias"),
    *("conj_physical_", "neg_"),
)


def resolving(kernels: Iterable[tuple[str, Kernel]]) -> Iterator[tuple[str, Kernel]]:
    """The kernels by their names, those that may be given such views wrapped."""
    for name, kernel in kernels:
        yield name, kernel if name.startswith(_INDIFFERENT) or not _gets_views(name) else _wrapped(name, kernel)


def _gets_views(name: str) -> bool:
    """Whether torch leaves the bits to the kernel."""
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    return has(f"aten::{name}", "Conjugate") or has(f"aten::{name}", "Negative")


def _wrapped(name: str, kernel: Kernel) -> Kernel:
    writes = name.partition(".")[0].endswith("_")

    @functools.wraps(kernel)
    def call(*args: Any, **kwargs: Any) -> Any:
        for arg in args:
            if isinstance(arg, torch.Tensor) and (arg.is_conj() or arg.is_neg()):
                break
        else:
            return kernel(*args, **kwargs)
        if writes and (args[0].is_conj() or args[0].is_neg()):
            return _write_through(name, kernel, args, kwargs)
        return kernel(*(_resolved(arg) for arg in args), **kwargs)

    return call


def _resolved(arg: Any) -> Any:
    if not isinstance(arg, torch.Tensor):
        return arg
    if arg.is_conj():
        arg = torch.conj_physical(arg.conj())
    if arg.is_neg():
        arg = torch.neg(torch._neg_view(arg))
    return arg


def _write_through(name: str, kernel: Kernel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A write into such a view: its memory gets the conjugate, or the negative, of what is written."""
    target, *others = args
    if name != "copy_":
        raise NotImplementedError(f"aten.{name} on a conjugated or negated view. Call it on a copy: tensor.clone().")
    source = _resolved(others[0])
    memory = target
    if memory.is_conj():
        memory, source = memory.conj(), torch.conj_physical(source)
    if memory.is_neg():
        memory, source = torch._neg_view(memory), torch.neg(source)
    kernel(memory, source, *others[1:], **kwargs)
    return target
