"""Records: what the recorder knows of one storage of the accelerator, and the value it holds between steps.

A `Record` hangs on the storage (`tensor.untyped_storage()._moai`), so that views, `detach`, `.data =` and everything
that C++ does with tensor objects keep its identity. It dies with the storage, which is how liveness is known.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

Geometry = tuple[tuple[int, ...], tuple[int, ...], int, torch.dtype]  # size, stride, storage offset, dtype
Role = Literal["state", "batch", "undefined"]
Base = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]  # of the tensor that fills a storage


class Value:
    """The content of a storage at a step's edge: on the host, in a buffer on the devices, or both (then equal).

    `host` is a CPU tensor of the base geometry. `buffer` is whatever the session's executor returned. `role` is
    "batch" for what the script uploaded as data, "undefined" for memory that was allocated and never written, else
    "state".
    """

    __slots__ = ("buffer", "host", "role")

    def __init__(self, host: torch.Tensor | None = None, buffer: Any = None, role: Role = "state") -> None:
        self.host = host
        self.buffer = buffer
        self.role: Role = role


class Usage:
    """Whether a value was used after the segment that made it. Outlives the record."""

    __slots__ = ("used",)

    def __init__(self) -> None:
        self.used = False


# That of every record that nobody watches: one is made for each tensor of a step, and few are kept.
_UNWATCHED = Usage()


class Record:
    """`base`: (size, stride, dtype) of the tensor that the storage was made for.

    `epoch` is the number of the last segment that used the storage, and `sid` its index among that segment's storages;
    `written` is the epoch of the last segment that wrote it, `value` what it held before that. `lost` says why there is
    no value where there is none; `made_by` is the call that made the storage, if a call did.
    """

    __slots__ = ("__weakref__", "base", "epoch", "lost", "made_by", "sid", "usage", "value", "written")

    def __init__(self, base: Base) -> None:
        self.base = base
        self.epoch = -1
        self.sid = -1
        self.written = -1
        self.value: Value | None = None
        self.lost = ""
        self.made_by: Any = None
        self.usage = _UNWATCHED


def record_of(tensor: torch.Tensor) -> Record:
    """The record of an accelerator tensor's storage."""
    try:
        return tensor.untyped_storage()._moai  # type: ignore[attr-defined]
    except AttributeError:
        raise RuntimeError(
            "This accelerator tensor's storage was made outside the accelerator (by C++ code of a library?), so its "
            "content is not known. Make the tensor with torch functions, or on the CPU and move it with .to('cuda')."
        ) from None


def geometry_of(tensor: torch.Tensor) -> Geometry:
    """Where in its storage a tensor lies."""
    return tuple(tensor.size()), tensor.stride(), int(tensor.storage_offset()), tensor.dtype


def lives_on(tensor: torch.Tensor) -> None:
    """What was uploaded for `tensor` is a state: it does not end with a step, as a batch does."""
    record = getattr(tensor.untyped_storage(), "_moai", None)  # none: torch's own stand-in for a tensor
    if record is not None and record.value is not None and record.value.role == "batch":
        record.value.role = "state"
