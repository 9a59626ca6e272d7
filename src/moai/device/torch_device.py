"""`torch.device`: the name "cuda" means the accelerator, and the accelerator says that it is "cuda".

In: what scripts pass to `torch.device`. Out: devices whose C++ type is PrivateUse1 (named "moai") wherever "cuda" was
said; `type`, `str` and `repr` of such a device say "cuda". Strings that C++ parses by itself never come here.
"""

from __future__ import annotations

from typing import Any

import torch

from moai.device import inplace

NAME = "moai"  # what C++ calls the device type


def install() -> None:
    """Changes `torch.device` in place. Call once, after the device type has been named."""
    construct = inplace.constructor(torch.device)
    cxx_type = torch.device.type.__get__  # type: ignore[attr-defined]

    def new(cls: type, *args: Any, **kwargs: Any) -> torch.device:
        if args:
            args = (_renamed(args[0]), *args[1:])
        else:
            kwargs = {name: _renamed(value) for name, value in kwargs.items()}
        device = construct(cls, args, kwargs)
        if device.index and cxx_type(device) == NAME:
            raise RuntimeError(invalid_ordinal(device.index))
        return device

    def shown_type(self: torch.device) -> str:
        name = cxx_type(self)
        return "cuda" if name == NAME else name

    def shown(self: torch.device) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def representation(self: torch.device) -> str:
        return (
            f"device(type='{self.type}')" if self.index is None else f"device(type='{self.type}', index={self.index})"
        )

    def reduce(self: torch.device) -> tuple[Any, ...]:
        # A pickled device must open where nobody knows the name "moai".
        return torch.device, (self.type,) if self.index is None else (self.type, self.index)

    inplace.change(
        torch.device,
        {
            "__new__": staticmethod(new),
            "type": property(shown_type, doc="The type of the device as a string, e.g. 'cuda' or 'cpu'."),
            "__str__": shown,
            "__repr__": representation,
            "__reduce__": reduce,
        },
    )


def invalid_ordinal(index: int) -> str:
    """The message for a device that is not there, in CUDA's words."""
    return (
        f"CUDA error: invalid device ordinal\ncuda:{index} is out of range: the accelerator is one device, cuda:0, "
        "however many physical devices it has. Use 'cuda' or 'cuda:0'."
    )


def _renamed(name: Any) -> Any:
    return NAME + name[4:] if isinstance(name, str) and name.startswith("cuda") else name
