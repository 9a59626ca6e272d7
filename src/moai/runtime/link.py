"""Link: the controller's side of one worker: a queue of commands that a thread sends, and a thread that receives.

In: commands, with tensors to upload; memory for what is read. Out: replies, given to `on_reply` as they come.

Sending has its own thread so that Ctrl-C in the script can never cut a message in two, and so that a slow worker
does not hold up the others.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable

import torch

from moai.runtime import messages as m
from moai.runtime.launcher import Worker
from moai.runtime.transport import Channel, encode, memory_of, pieces


class Link:
    """`changed` guards every attribute below and is notified when one changes.

    posted, sent: how many commands were given to `post`, and how many of these have left.
    backlog: bytes of tensors posted and not yet sent. awaited: what the worker owes an answer for.
    """

    def __init__(self, worker: Worker, changed: threading.Condition) -> None:
        self.worker = worker
        self.posted = 0
        self.sent = 0
        self.backlog = 0
        self.awaited: set[object] = set()
        self._changed = changed
        self._channel: Channel = worker.channel
        self._outbox: queue.SimpleQueue[tuple[bytes, torch.Tensor | None]] = queue.SimpleQueue()
        self._small: list[m.Small] = []
        self._reads: dict[int, tuple[torch.Tensor, int]] = {}

    def start(self, on_reply: Callable[[int, m.Reply], None], on_lost: Callable[[int], None]) -> None:
        """Starts the threads. `on_lost` is called once, when the connection has ended."""
        name = f"moai-device-{self.worker.rank}"
        threading.Thread(target=self._send, name=f"{name}-send", daemon=True).start()
        threading.Thread(target=self._receive, args=(on_reply, on_lost), name=f"{name}-receive", daemon=True).start()

    @property
    def at_work(self) -> bool:
        """Whether the worker has something to do or to receive."""
        return bool(self.awaited) or self.sent != self.posted

    def post(self, command: bytes, tensor: torch.Tensor | None = None, awaits: object = None) -> int:
        """Queues an encoded command, with a tensor whose bytes follow it; `tensor` may change once `sent` reaches the
        number returned. `awaits` stays in `awaited` until `answered`."""
        with self._changed:
            small, self._small = tuple(self._small), []
            if small:
                self.post(encode(m.PutSmall(small)))
            self.posted += 1
            self.backlog += tensor.nbytes if tensor is not None else 0
            if awaits is not None:
                self.awaited.add(awaits)
            self._outbox.put((command, tensor))
            return self.posted

    def put_small(self, tensor: m.Small) -> None:
        """Queues a small tensor for the next command: a step has many, and each message wakes three threads."""
        with self._changed:
            self._small.append(tensor)

    def answered(self, what: object) -> None:
        """The worker no longer owes `what`."""
        with self._changed:
            self.awaited.discard(what)
            self._changed.notify_all()

    def read(self, request: int, command: bytes, target: torch.Tensor) -> None:
        """Posts a read whose result fills the contiguous `target`; it has when `request` is no longer `awaited`."""
        self._reads[request] = (target, 0)
        self.post(command, awaits=request)

    def hang_up(self) -> None:
        """Ends the connection, and with it the threads and the worker."""
        self._channel.hang_up()
        self._outbox.put((b"", None))

    def abandon(self) -> None:
        """See `Channel.abandon`."""
        self._channel.abandon()

    def _send(self) -> None:
        try:
            while True:
                command, tensor = self._outbox.get()
                if not command:
                    return
                self._channel.send_encoded(command, pieces(tensor) if tensor is not None else ())
                with self._changed:
                    self.sent += 1
                    self.backlog -= tensor.nbytes if tensor is not None else 0
                    self._changed.notify_all()
                del tensor
        except OSError:
            self._channel.hang_up()  # the receiving thread reports it

    def _receive(self, on_reply: Callable[[int, m.Reply], None], on_lost: Callable[[int], None]) -> None:
        try:
            while True:
                reply = self._channel.receive()
                if isinstance(reply, m.Part):
                    self._receive_part(reply)
                on_reply(self.worker.rank, reply)
        except (EOFError, OSError):
            pass
        finally:
            on_lost(self.worker.rank)

    def _receive_part(self, part: m.Part) -> None:
        target, received = self._reads[part.request]
        self._channel.receive_into(memory_of(target)[part.offset : part.offset + part.nbytes])
        received += part.nbytes
        self._reads[part.request] = (target, received)
        if received == target.nbytes:
            del self._reads[part.request]
            self.answered(part.request)
