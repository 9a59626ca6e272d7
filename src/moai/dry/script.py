"""A script up to its first training step, as Python would run it.

In: the script and its arguments. Out: a `Failure` if it ends without such a step, in one sentence; otherwise this does
not return, since `DrySession` ends the process in the middle of the script.
"""

from __future__ import annotations

import os
import runpy
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NoReturn

_LONGEST = 200  # characters of an error


class Failure(Exception):
    """There is no step to plan; the text says why, in one sentence for a person. `explained`: the sentence has the
    reason; else what the script printed last may have it."""

    def __init__(self, text: str, explained: bool = True) -> None:
        super().__init__(text, explained)
        self.text = text
        self.explained = explained


def run(script: str, arguments: Sequence[str], flush: Callable[[], None]) -> NoReturn:
    """Run `script` as the main program. `flush` ends what it has recorded, if it ends by itself."""
    sys.argv = [script, *arguments]
    sys.path[0] = script if os.path.isdir(script) else os.path.dirname(os.path.abspath(script))
    name = os.path.basename(script)
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as exit:
        told = isinstance(exit.code, str)
        status = f": {exit.code}" if told else f", with exit status {int(exit.code or 0)}"
        raise Failure(f"{name} ended before its first training step{status}", told) from None
    except BaseException as error:
        place = _place(error, script)
        raise Failure(f"{name} failed before its first training step{place}: {described(error)}") from None
    flush()  # nobody has read the loss of a step, if there was one
    raise Failure(
        f"{name} ended without a training step: it never called the step() of a torch optimizer for a model on the "
        'accelerator ("cuda")'
    )


def described(error: BaseException) -> str:
    """An error as the last line of a traceback has it, cut where libraries begin to enumerate."""
    text = " ".join(str(error).split())
    if len(text) > _LONGEST:
        text = text[:_LONGEST] + "..."
    if isinstance(error, EOFError):
        text += " (nobody can answer its questions here)"
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _place(error: BaseException, script: str) -> str:
    """The script's own line, if the error came through one."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == script]
    return f" (line {lines[-1]})" if lines else ""
