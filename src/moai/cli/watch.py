"""`--watch`: a screen that is painted again and again.

In: what to paint. Out: on a terminal, one picture that changes in place, cut to the window; elsewhere, one picture
after another.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable

from moai.cli.tables import clip

CLEAR_SCREEN = "\x1b[H\x1b[2J"
TOP_LEFT = "\x1b[H"
CLEAR_LINE = "\x1b[K"
CLEAR_BELOW = "\x1b[J"


def watch(seconds: float, paint: Callable[[], str]) -> int:
    """Show `paint()` every `seconds` until Ctrl-C, which is the way to end it. Returns the exit status."""
    on_terminal = sys.stdout.isatty()
    try:
        if on_terminal:
            sys.stdout.write(CLEAR_SCREEN)
        while True:
            text = paint()
            sys.stdout.write(_repaint(text) if on_terminal else f"{text}\n")
            sys.stdout.flush()
            time.sleep(seconds)
    except KeyboardInterrupt:
        if on_terminal:
            print()  # the shell's prompt begins on a line of its own, not behind ^C
        return 0


def _repaint(text: str) -> str:
    """Writes over the last picture without clearing it first, which would flicker."""
    window = shutil.get_terminal_size()
    lines = [clip(line, window.columns) for line in text.splitlines()[: window.lines - 1]]
    return TOP_LEFT + "".join(f"{CLEAR_LINE}{line}\n" for line in lines) + CLEAR_BELOW
