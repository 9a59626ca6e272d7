"""Progress of waits that are long enough to be noticed.

In: a wait, as a `with` block. Out: nothing for two seconds; then, on a terminal, a line on stderr with a spinner (or a
bar, if the total is known) and the time elapsed; elsewhere one log line.
"""

from __future__ import annotations

import sys
import threading
import time
from types import TracebackType
from typing import TYPE_CHECKING

from moai.platform.log import logger

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET_SECONDS = 2.0


class Waiting:
    """`with Waiting("Loading the model", total=12) as wait: ... wait.advance()`.

    `total` is a number of steps; leave it out where it is not known.
    """

    def __init__(self, text: str, total: int | None = None, quiet_seconds: float = QUIET_SECONDS) -> None:
        self._text = text
        self._total = total
        self._done = 0
        self._began = time.monotonic()
        self._lock = threading.Lock()
        self._over = False
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._timer = threading.Timer(quiet_seconds, self._show)
        self._timer.daemon = True

    def __enter__(self) -> Waiting:
        self._began = time.monotonic()
        self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._timer.cancel()
        with self._lock:
            self._over = True
            if self._bar is not None:
                self._bar.stop()

    def advance(self, steps: int = 1) -> None:
        """Say that `steps` more steps are done; may be called from any thread."""
        with self._lock:
            self._done += steps
            if self._bar is not None and self._task is not None:
                self._bar.update(self._task, completed=self._done)

    def _show(self) -> None:
        with self._lock:
            if self._over:
                return
            if sys.stderr.isatty():
                self._show_bar()
            else:
                so_far = "" if self._total is None else f", {self._done} of {self._total} done"
                logger.info("%s (for %.0f s%s)...", self._text, time.monotonic() - self._began, so_far)

    def _show_bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

        known = () if self._total is None else (BarColumn(), MofNCompleteColumn())
        self._bar = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            *known,
            TimeElapsedColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self._text, total=self._total, completed=self._done)
        self._bar.tasks[0].start_time = self._began  # the wait began before the bar did
        self._bar.start()
