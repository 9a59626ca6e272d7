"""Saving, loading and copying storages of the accelerator.

In: `torch.save`, `torch.load`, `UntypedStorage` methods. Out: files that carry the tag "cuda:0" and open wherever
PyTorch runs, and storages moved between host and accelerator by copies of tensors, as there is no allocator behind
this device.
"""

from __future__ import annotations

from typing import Any

import torch

from moai.device.torch_device import invalid_ordinal

_PRIORITY = 5  # before torch's own handlers, whose numbers start at 10


def install() -> None:
    """Registers the file tags and the storage methods. Call once."""
    torch.serialization.register_package(_PRIORITY, _tag, _restore)

    clone, to = torch.UntypedStorage.clone, torch.UntypedStorage.to

    def clone_anywhere(self: torch.UntypedStorage) -> torch.UntypedStorage:
        """Return a copy of this storage."""
        return as_bytes(self).clone().untyped_storage() if self.device.type == "cuda" else clone(self)

    def to_anywhere(self: torch.UntypedStorage, *, device: Any, non_blocking: bool = False) -> torch.UntypedStorage:
        """This storage on `device`: itself if it is there, otherwise a copy."""
        device = torch.device(device)
        if "cuda" not in (device.type, self.device.type):
            return to(self, device=device, non_blocking=non_blocking)
        return self if device.type == self.device.type else as_bytes(self).to(device).untyped_storage()

    def cpu(self: torch.UntypedStorage) -> torch.UntypedStorage:
        """This storage on the CPU."""
        return to_anywhere(self, device="cpu")

    def cuda(self: torch.UntypedStorage, device: Any = "cuda", non_blocking: bool = False) -> torch.UntypedStorage:
        """This storage on the accelerator."""
        return to_anywhere(self, device=device)

    for name, method in {"clone": clone_anywhere, "to": to_anywhere, "cpu": cpu, "cuda": cuda}.items():
        setattr(torch.UntypedStorage, name, method)


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The whole storage as uint8[nbytes], where it lies."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def _tag(storage: Any) -> str | None:
    return "cuda:0" if storage.device.type == "cuda" else None


def _restore(storage: Any, location: str) -> torch.UntypedStorage | None:
    if not location.startswith("cuda"):
        return None
    index = location.partition(":")[2]
    if index and int(index) > 0:
        raise RuntimeError(
            f"{invalid_ordinal(int(index))} To load a file that was saved from several devices, call torch.load with "
            "map_location='cuda'."
        )
    return storage.to(device="cuda")
