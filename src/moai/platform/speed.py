"""The mean speed of a training job, from runs that were awaited.

In: when each training step was handed over, and its tokens. A step is handed over only after the one before it has
finished, so the times between hand-overs are times of finished steps. The first step, which plans, loads and uploads,
does not count, nor does the last, whose end nobody waits for.
"""

from __future__ import annotations

import time
from collections.abc import Callable


class Speedometer:
    """`step(tokens)` at every hand-over of a training step; `tokens_per_s` is None before the third."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._steps = 0
        self._pending = 0  # tokens of the step that may still be running
        self._tokens = 0
        self._began = self._ended = 0.0

    def step(self, tokens: int) -> None:
        """A step over `tokens` tokens was handed over now: the one before it has finished."""
        now = self._clock()
        self._steps += 1
        if self._steps == 2:
            self._began = now
        elif self._steps > 2:
            self._tokens += self._pending
            self._ended = now
        self._pending = tokens

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens a second over the steps that count."""
        if self._steps < 3 or not self._tokens or self._ended <= self._began:
            return None
        return self._tokens / (self._ended - self._began)
