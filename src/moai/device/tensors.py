"""Methods of `torch.Tensor` that must know that "cuda" is the accelerator.

In: calls with a device as a string, which C++ parses into the CUDA that is not there. Out: the same calls with the
accelerator's device; tensors that are on it already come back as they are. Two things that CUDA does in C++ are done
here as well: `x.data = y` with `y` on the other device, which is how `Module.cuda()` moves parameters while everybody
who holds them keeps them; and `copy.deepcopy`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from moai.capture import provenance
from moai.device import torch_device

Function = Callable[..., Any]


def install() -> None:
    """Changes `torch.Tensor` and the functions that go with it. Call once, after `torch_device.install`."""
    tensor = torch.Tensor
    replacements = {
        "to": _device_first(tensor.to),
        "cuda": _cuda(tensor.to),
        "type": _type(tensor.type),
        "is_cuda": property(_is_cuda),
        "pin_memory": _pin_memory,
        "is_pinned": _is_pinned,
        "record_stream": _record_stream(tensor.record_stream),
        "data": _data(),
        "__deepcopy__": _deepcopy(tensor.__deepcopy__),
    }
    for name, replacement in replacements.items():
        setattr(tensor, name, replacement)
    torch._has_compatible_shallow_copy_type = _can_set_data(torch._has_compatible_shallow_copy_type)
    torch._C._nn._parse_to = _parse_to(torch._C._nn._parse_to)  # type: ignore[attr-defined]


def named(device: Any) -> Any:
    """A device said as a string becomes a `torch.device`; anything else stays."""
    return torch.device(device) if isinstance(device, str) and device.startswith("cuda") else device


def _device_first(to: Function) -> Function:
    """`Tensor.to(device, ...)` and `Tensor.to(..., device=device)`."""

    @functools.wraps(to)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if args:
            args = (named(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = named(kwargs["device"])
        if self.layout is not torch.strided:
            self = _dense(self, args[0] if args else kwargs.get("device"))
        return to(self, *args, **kwargs)

    return call


def _dense(tensor: torch.Tensor, target: Any) -> torch.Tensor:
    """A sparse tensor that goes to the accelerator, which has none, becomes a dense one: the same numbers."""
    moves = isinstance(target, torch.device) and target.type == "cuda" and not tensor.is_nested
    return tensor.to_dense() if moves else tensor


def _parse_to(parse: Function) -> Function:
    """What `Module.to` and those who imitate it parse their arguments with."""

    @functools.wraps(parse)
    def call(*args: Any, **kwargs: Any) -> Any:
        if args:
            args = (named(args[0]), *args[1:])
        elif "device" in kwargs:
            kwargs["device"] = named(kwargs["device"])
        return parse(*args, **kwargs)

    return call


def _cuda(to: Function) -> Function:
    accelerator = torch.device("cuda", 0)

    def cuda(
        self: torch.Tensor,
        device: Any = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> torch.Tensor:
        """The tensor on the accelerator: itself if it is there, otherwise a copy."""
        target = accelerator if device is None else torch.device(device)
        if target.type != "cuda":
            raise ValueError(f"Invalid device, must be cuda device: {target}")
        self = self if self.layout is torch.strided else _dense(self, target)
        return to(self, target, non_blocking=non_blocking, memory_format=memory_format)

    return cuda


def _type(type_: Function) -> Function:
    @functools.wraps(type_)
    def call(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = type_(self, *args, **kwargs)
        return result.replace(f"torch.{torch_device.NAME}.", "torch.cuda.") if isinstance(result, str) else result

    return call


def _is_cuda(self: torch.Tensor) -> bool:
    """Whether the tensor is on the accelerator."""
    return self.device.type == "cuda"


def _pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
    """The tensor itself: it is copied to other processes, not by a GPU from here, so page-locking gains nothing."""
    return self


def _is_pinned(self: torch.Tensor, device: Any = None) -> bool:
    return False


def _record_stream(record_stream: Function) -> Function:
    @functools.wraps(record_stream)
    def call(self: torch.Tensor, stream: Any) -> None:
        """Nothing: the script's streams are one sequence of work, in which no memory is given away too early."""
        if not self.is_cuda:
            record_stream(self, stream)

    return call


def _crosses(a: torch.Tensor, b: torch.Tensor) -> bool:
    return {a.device.type, b.device.type} == {"cpu", "cuda"}


def _can_set_data(compatible: Function) -> Function:
    """`Module._apply` asks this before it sets `.data`; where the answer is no it makes new parameters, which unties
    weights."""

    @functools.wraps(compatible)
    def call(tensor: torch.Tensor, new: torch.Tensor) -> bool:
        return compatible(tensor, new) or _crosses(tensor, new)

    return call


def _data() -> property:
    inherited = torch._C.TensorBase.data

    def set_data(self: torch.Tensor, new: torch.Tensor) -> None:
        if isinstance(new, torch.Tensor) and _crosses(self, new):
            _become(self, new)
        else:
            inherited.__set__(self, new)  # type: ignore[attr-defined]

    return property(inherited.__get__, set_data, inherited.__delete__)  # type: ignore[attr-defined]


def _become(tensor: torch.Tensor, new: torch.Tensor) -> None:
    """Makes the object `tensor` the tensor `new` on another device; its gradient and hooks go with it.

    C++ refuses to set data across device types that it does not know, so the two exchange their C++ halves.
    """
    replacement = new.detach()
    if isinstance(tensor, torch.nn.Parameter):
        replacement = torch.nn.Parameter(replacement, tensor.requires_grad)
    else:
        replacement.requires_grad_(tensor.requires_grad)
    if tensor.grad is not None:
        replacement.grad = tensor.grad.to(new.device)
        tensor.grad = None  # C++ exchanges tensors that nothing else refers to
    attributes = tensor.__dict__
    hooks, after = tensor._backward_hooks, tensor._post_accumulate_grad_hooks
    try:
        torch.utils.swap_tensors(tensor, replacement)
    except RuntimeError as error:
        raise RuntimeError(
            f"A tensor of shape {tuple(tensor.shape)} cannot be moved to {new.device.type}{provenance.in_script()}: an "
            "autograd graph that is still alive, a weak reference or a TorchScript module holds it. Move the module "
            "before it is used, or scripted (torch.jit.script)."
        ) from error
    tensor.__dict__.update(attributes)
    if hooks:
        tensor._backward_hooks = hooks
    if after:
        tensor._post_accumulate_grad_hooks = after


def _deepcopy(deepcopy: Function) -> Function:
    """Copies storages of the accelerator with the type of the first tensor that shows them, instead of as bytes."""

    @functools.wraps(deepcopy)
    def call(self: torch.Tensor, memo: dict[Any, Any]) -> torch.Tensor:
        if self.is_leaf and self.is_cuda and type(self) is torch.Tensor:
            storage = self.untyped_storage()
            storages = memo.setdefault("torch", {})
            if storage._cdata not in storages:
                whole = self.detach().as_strided((storage.nbytes() // self.element_size(),), (1,), 0)
                storages[storage._cdata] = whole.clone().untyped_storage()
        return deepcopy(self, memo)

    return call
