"""Channel: messages and tensors between the controller and one worker, over an authenticated connection.

In: picklable messages, and raw bytes behind those that announce them. A tensor is never pickled, and never copied
as a whole: its bytes go from its memory to the socket, and from the socket to memory.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge
from typing import Any

import torch

PIECE_BYTES = 16 << 20


class Channel:
    """One end of a connection. Any thread may send; one thread receives.

    Methods raise EOFError or OSError when the other side is gone.
    """

    def __init__(self, connection: Connection) -> None:
        with socket.socket(fileno=os.dup(connection.fileno())) as s:
            # A message is several small writes: it must not wait for the acknowledgement of the first.
            s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = connection
        self._sending = threading.Lock()

    def send(self, message: Any, payload: Iterable[memoryview] = ()) -> None:
        """Sends a message and the bytes that it announces; blocks until the system has taken them over."""
        self.send_encoded(encode(message), payload)

    def send_encoded(self, message: bytes, payload: Iterable[memoryview] = ()) -> None:
        """`send` for a message that goes to many workers and is encoded once."""
        with self._sending:
            self._connection.send_bytes(message)
            for piece in payload:
                while len(piece):
                    piece = piece[os.write(self._connection.fileno(), piece) :]

    def receive(self) -> Any:
        """The next message; blocks."""
        return pickle.loads(self._connection.recv_bytes())

    def poll(self, timeout: float) -> bool:
        """Whether something is there to receive, if need be after `timeout` seconds."""
        return self._connection.poll(timeout)

    def receive_into(self, memory: memoryview) -> None:
        """Fills `memory` with bytes that the last message announced."""
        while len(memory):
            n = os.readv(self._connection.fileno(), [memory])
            if n == 0:
                raise EOFError
            memory = memory[n:]

    def hang_up(self) -> None:
        """Ends the connection for both sides; threads that are blocked in a method of this object wake up."""
        try:
            with socket.socket(fileno=os.dup(self._connection.fileno())) as s:
                s.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # gone already

    def abandon(self) -> None:
        """Lets go of a copy inherited by fork, without ending the connection of the process that owns it."""
        self._connection.close()


def authenticate(caller: socket.socket, secret: bytes) -> Channel | None:
    """A channel to a caller who knows the secret; None for any other, who may cost us a second."""
    with caller:
        caller.setblocking(True)
        connection = Connection(os.dup(caller.fileno()))
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 1, 0))
        try:
            deliver_challenge(connection, secret)
            answer_challenge(connection, secret)
        except (AuthenticationError, OSError, EOFError):
            connection.close()
            return None
        caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", 0, 0))
        return Channel(connection)


def encode(message: Any) -> bytes:
    """What `Channel.send_encoded` takes."""
    return pickle.dumps(message, protocol=5)


def memory_of(x: torch.Tensor) -> memoryview:
    """The bytes of a contiguous CPU tensor, writable. The tensor must outlive the view."""
    assert x.device.type == "cpu" and x.is_contiguous()
    if not x.nbytes:
        return memoryview(b"")
    return memoryview((ctypes.c_char * x.nbytes).from_address(x.data_ptr())).cast("B")


def pieces(x: torch.Tensor, limit: int = PIECE_BYTES) -> Iterator[memoryview]:
    """The bytes of a CPU tensor in row-major order, in views of at most `limit` bytes.

    A view is valid until the next is taken. Of a tensor that is not contiguous, `limit` bytes are copied at a time.
    """
    if x.is_contiguous():
        memory = memory_of(x)
        for start in range(0, len(memory), limit):
            yield memory[start : start + limit]
    elif x.nbytes <= limit:
        yield from pieces(x.contiguous(), limit)
    elif x.shape[0] == 1:
        yield from pieces(x[0], limit)
    else:
        for rows in x.split(max(1, limit * x.shape[0] // x.nbytes)):
            yield from pieces(rows, limit)
