"""Streams and events of the accelerator.

In: what scripts do with `torch.cuda.Stream` and `torch.cuda.Event`. Out: objects that behave as on a GPU whose streams
all run in the order of the script. What is recorded is one sequence, ordered by its data, so waiting for
another stream is nothing to do. A timing event waits for the work before it: its times are those of work that is done.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from moai.device import owner

__all__ = ["Event", "Stream", "StreamContext", "current_stream", "default_stream", "set_stream", "stream"]


class Stream:
    """A name for a part of the script's one sequence of work."""

    def __init__(self, device: Any = None, priority: int = 0, **kwargs: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.device_index = 0
        self.priority = priority
        self.cuda_stream = self.stream_id = 0

    def synchronize(self) -> None:
        """Returns when everything asked for so far is done."""
        _synchronize()

    def query(self) -> bool:
        """Whether everything asked for so far is done: always, as asking waits for it."""
        _synchronize()
        return True

    def wait_stream(self, stream: Stream) -> None:
        """Orders what comes after `stream`'s work; it is ordered already."""

    def wait_event(self, event: Event) -> None:
        """Orders what comes after `event`; it is ordered already."""

    def record_event(self, event: Event | None = None) -> Event:
        """Records `event`, or a new one, here; returns it."""
        event = event or Event()
        event.record(self)
        return event


class Event:
    """A point in the script's sequence of work. With `enable_timing` it holds the time at which it was reached."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False, interprocess: bool = False) -> None:
        if interprocess:
            raise RuntimeError(
                "Events of the accelerator cannot be shared between processes. Leave interprocess=False."
            )
        self.device = torch.device("cuda", 0)
        self._timing = enable_timing
        self._reached: float | None = None

    def record(self, stream: Stream | None = None) -> None:
        """Marks this point. A timing event waits until it is reached."""
        if self._timing:
            _synchronize()
        self._reached = time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        """Orders what comes later after this event; it is ordered already."""

    def synchronize(self) -> None:
        """Returns when everything asked for so far is done."""
        _synchronize()

    def query(self) -> bool:
        """Whether the work before this event is done: always, as asking waits for it."""
        _synchronize()
        return True

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`. Raises ValueError if either holds no time."""
        for event in (self, end_event):
            if not event._timing or event._reached is None:
                raise ValueError(
                    "Both events must be created with enable_timing=True and be recorded before their time is read."
                )
        assert self._reached is not None and end_event._reached is not None
        return (end_event._reached - self._reached) * 1e3


class StreamContext:
    """`with torch.cuda.stream(s)`: `s` is the current stream inside."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream

    def __enter__(self) -> None:
        self._before = current_stream()
        set_stream(self.stream)

    def __exit__(self, *exc: object) -> None:
        set_stream(self._before)


_default = _current = None


def stream(stream: Stream | None) -> StreamContext:
    return StreamContext(stream)


def current_stream(device: Any = None) -> Stream:
    return _current or default_stream()


def default_stream(device: Any = None) -> Stream:
    global _default
    _default = _default or Stream()
    return _default


def set_stream(stream: Stream | None) -> None:
    global _current
    _current = stream or _current


def _synchronize() -> None:
    owner.current().synchronize()
