"""Messages from one device to another: of a pipeline's stages.

In: tensors of one dtype. Out: the same on the other device, in fresh memory. What a device sends to another arrives in
the order in which it was sent. A message is one flat tensor, whatever it holds.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist

Tensors = tuple[torch.Tensor, ...]


class Partner(Protocol):
    """Another device."""

    def send(self, xs: Sequence[torch.Tensor]) -> None:
        """In the background: the xs may be freed or overwritten as soon as it returns."""

    def receive(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensors:
        """Waits for the next message."""


class Outbox:
    """Messages that are under way, kept until they have arrived. Backends do not say of a message that it has, but to
    those who wait for it: a thread does."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[dist.Work, torch.Tensor]] = queue.Queue()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def put(self, work: dist.Work, message: torch.Tensor) -> None:
        """Take charge of a message that is being sent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._see_off, name="outbox", daemon=True)
            self._thread.start()
        self._waiting.put((work, message))

    def empty(self) -> None:
        """Waits until all messages have arrived. RuntimeError if one could not."""
        self._waiting.join()
        if self._failure is not None:
            raise RuntimeError(f"a message to another stage did not arrive: {self._failure}") from self._failure

    def _see_off(self) -> None:
        while True:
            work, message = self._waiting.get()
            try:
                work.wait()
            except Exception as error:
                self._failure = self._failure or error
            del work, message
            self._waiting.task_done()


class OfGroup:
    """`Partner` by the device's rank in `group`."""

    def __init__(self, group: dist.ProcessGroup, rank: int, device: torch.device, outbox: Outbox) -> None:
        self._group = group
        self._rank = rank
        self._device = device
        self._outbox = outbox

    def send(self, xs: Sequence[torch.Tensor]) -> None:
        message = torch.cat([x.reshape(-1) for x in xs])  # a copy, of a single one too
        if message.numel():
            # As bytes: sending does not compute, and backends know fewer dtypes than PyTorch.
            work = dist.isend(message.view(torch.uint8), group=self._group, group_dst=self._rank)
            assert work is not None
            self._outbox.put(work, message)

    def receive(self, shapes: Sequence[Sequence[int]], dtype: torch.dtype) -> Tensors:
        sizes = [torch.Size(shape).numel() for shape in shapes]
        message = torch.empty(sum(sizes), dtype=dtype, device=self._device)
        if message.numel():
            work = dist.irecv(message.view(torch.uint8), group=self._group, group_src=self._rank)
            assert work is not None
            work.wait()
        return tuple(part.view(tuple(shape)) for part, shape in zip(message.split(sizes), shapes, strict=True))
