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

    write_file, set_from_file = torch.UntypedStorage._write_file, torch.UntypedStorage._set_from_file

    def write_file_anywhere(self: torch.UntypedStorage, *args: Any) -> None:
        write_file(self.cpu(), *args)

    def set_from_file_anywhere(self: torch.UntypedStorage, *args: Any) -> None:
        host = self if self.device.type == "cpu" else torch.UntypedStorage(self.nbytes())
        set_from_file(host, *args)
        if host is not self:
            as_bytes(self).copy_(as_bytes(host))

    replacements = {
        "clone": clone_anywhere,
        "to": to_anywhere,
        "cpu": cpu,
        "cuda": cuda,
        "_write_file": write_file_anywhere,
        "_set_from_file": set_from_file_anywhere,
    }
    for name, replacement in replacements.items():
        setattr(torch.UntypedStorage, name, replacement)
    _rebuild_with_types()


def as_bytes(storage: torch.UntypedStorage) -> torch.Tensor:
    """The whole storage as uint8[nbytes], where it lies."""
    return torch.empty(0, dtype=torch.uint8, device=storage.device).set_(storage)  # type: ignore[call-overload]


def _rebuild_with_types() -> None:
    """Storages are loaded as bytes, before it is known of what: gives them the type of the first tensor built."""
    rebuild = torch._utils._rebuild_tensor

    def rebuild_typed(storage: Any, offset: int, size: Any, stride: Any) -> torch.Tensor:
        tensor = rebuild(storage, offset, size, stride)
        if tensor.is_cuda:
            _give_type(tensor)
        return tensor

    torch._utils._rebuild_tensor = rebuild_typed


def _give_type(tensor: torch.Tensor) -> None:
    from moai.capture.meta import is_dense
    from moai.capture.values import record_of

    record = record_of(tensor)
    value = record.value
    untouched = record.epoch == -1 and value is not None and value.host is not None and value.buffer is None
    if not untouched or record.base[2] != torch.uint8 or tensor.dtype == torch.uint8:
        return
    assert value is not None and value.host is not None
    host = value.host.view(tensor.dtype)
    if tensor.numel() == host.numel() and is_dense(tensor.size(), tensor.stride()):
        host = host.as_strided(tensor.size(), tensor.stride())
    value.host, record.base = host, (tuple(host.size()), host.stride(), host.dtype)


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
