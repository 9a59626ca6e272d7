"""Messages from one device to another: of a pipeline's stages.

In: tensors of one dtype. Out: the same on the other device, in fresh memory. What a device sends to another arrives in
the order in which it was sent. A message is one flat tensor, whatever it holds.
"""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist


@dataclass(frozen=True, slots=True)
class Arriving:
    """A message that is being received."""

    work: dist.Work | None
    message: torch.Tensor

    def wait(self) -> torch.Tensor:
        """The message, once it is there."""
        if self.work is not None:
            self.work.wait()
        return self.message


class Partner(Protocol):
    """Another device."""

    def send(self, xs: Sequence[torch.Tensor]) -> None:
        """In the background: the xs may be freed or overwritten as soon as it returns."""

    def expect(self, length: int, dtype: torch.dtype) -> Arriving:
        """Begins to receive the next message, of so many entries. In the background."""


class Outbox:
    """Messages that are under way, kept until they have arrived. Backends do not say of a message that it has, but to
    those who wait for it: a thread does. Who sends the next one lets go of those that have arrived."""

    def __init__(self) -> None:
        self._waiting: queue.Queue[_Sent] = queue.Queue()
        self._arrived: deque[_Sent] = deque()
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    def put(self, work: dist.Work, message: torch.Tensor) -> None:
        """Take charge of a message that is being sent."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._see_off, name="outbox", daemon=True)
            self._thread.start()
        self._arrived.clear()
        self._waiting.put(_Sent(work, message))

    def empty(self) -> None:
        """Waits until all messages have arrived. RuntimeError if one could not."""
        self._waiting.join()
        self._arrived.clear()
        if self._failure is not None:
            raise RuntimeError(f"a message to another stage did not arrive: {self._failure}") from self._failure

    def _see_off(self) -> None:
        while True:
            sent = self._waiting.get()
            try:
                _await(sent.work, sent.message.device)
            except Exception as error:
                self._failure = self._failure or error
            self._arrived.append(sent)
            del sent
            self._waiting.task_done()


@dataclass(frozen=True, slots=True)
class _Sent:
    work: dist.Work
    message: torch.Tensor


def _await(work: dist.Work, device: torch.device) -> None:
    """Blocks until `work` is over. On a GPU that is a wait in a stream of its own: in the one that computes, whatever
    comes next would wait, too."""
    if device.type == "cpu":
        work.wait()
        return
    with torch.cuda.device(device), torch.cuda.stream(torch.cuda.Stream(device)):
        work.wait()
        torch.cuda.current_stream().synchronize()


class OfGroup:
    """`Partner` by the device's rank. `going` and `coming`: the groups that messages to it and from it are sent in.
    Where a group has a single queue, as in NCCL, a receive that is begun early would hold up what is sent behind it,
    so that the two must differ."""

    def __init__(
        self, going: dist.ProcessGroup, coming: dist.ProcessGroup, rank: int, device: torch.device, outbox: Outbox
    ) -> None:
        self._going = going
        self._coming = coming
        self._rank = rank
        self._device = device
        self._outbox = outbox

    def send(self, xs: Sequence[torch.Tensor]) -> None:
        message = torch.cat([x.reshape(-1) for x in xs])  # a copy, of a single one too
        if message.numel():
            # As bytes: sending does not compute, and backends know fewer dtypes than PyTorch.
            work = dist.isend(message.view(torch.uint8), self._rank, self._going)
            assert work is not None
            self._outbox.put(work, message)

    def expect(self, length: int, dtype: torch.dtype) -> Arriving:
        message = torch.empty(length, dtype=dtype, device=self._device)
        work = dist.irecv(message.view(torch.uint8), self._rank, self._coming) if length else None
        return Arriving(work, message)
