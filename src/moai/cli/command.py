"""How a command begins and ends.

In: the body of a command. Out: an exit status; whatever goes wrong for a reason that a person can do something about
becomes one line on stderr.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from contextlib import suppress

from moai.platform.accelerators import AcceleratorError

FAILED = 1
INTERRUPTED = 130  # 128 + SIGINT, as shells count
BROKEN_PIPE = 141  # 128 + SIGPIPE


def run(body: Callable[[], int]) -> int:
    """The exit status of `body`, with all that it printed written out."""
    _accept_any_text()
    try:
        try:
            exit_status = body()
        except SystemExit as exit:  # how argparse ends
            exit_status = int(exit.code or 0)
        if sys.stdout:
            sys.stdout.flush()
        return exit_status
    except BrokenPipeError:
        complain("The reader of the output went away before all of it was written.")
        return BROKEN_PIPE
    except KeyboardInterrupt:
        print(file=sys.stderr)  # the shell's prompt begins on a line of its own, not behind ^C
        return INTERRUPTED
    except (AcceleratorError, OSError) as error:
        complain(str(error))
        return FAILED


def complain(text: str) -> None:
    """One line on stderr, after everything that was printed before it."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        _forget_stdout()
    with suppress(OSError):
        print(f"{program()}: {' '.join(text.split())}", file=sys.stderr)


def program() -> str:
    """What the person typed: the name of the command."""
    return os.path.basename(sys.argv[0])


def _accept_any_text() -> None:
    """Korean in a job's command line, or bytes that are no text at a prompt, must not end the command."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _forget_stdout() -> None:
    """What could not be written goes nowhere; else Python tries, and complains, once more at exit."""
    with suppress(OSError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)
