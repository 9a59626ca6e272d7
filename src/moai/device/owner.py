"""Who answers for the device: the process's session, as the device's rooms see it.

The session lies on a higher floor; it is handed in here as a function, and made when the device is used for the first
time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch

    from moai.capture.recorder import Recorder


class Owner(Protocol):
    """What the device needs of a session."""

    recorder: Recorder

    def acquire(self) -> object:
        """Connect to the accelerator's devices, if that has not been done."""

    def synchronize(self) -> None:
        """Run what is recorded and wait until the devices are idle."""

    def write(self, tensors: Sequence[tuple[torch.Tensor, int]], file: str) -> None:
        """Write contiguous accelerator tensors into a file, which is there, each from a byte on. OSError."""

    def memory(self) -> tuple[int, int, int]:
        """Bytes over all devices: used, the most ever used, and all there are."""


_provide: Callable[[], Owner] | None = None


def provide(make: Callable[[], Owner]) -> None:
    """Say where the session comes from."""
    global _provide
    _provide = make


def current() -> Owner:
    """The process's session."""
    assert _provide is not None, "the entry point provides the session"
    return _provide()
