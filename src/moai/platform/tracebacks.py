"""What a program prints when it ends with an error that came out of the accelerator: the script's own lines, and the
reason.

In: uncaught exceptions. Out: the traceback without the frames of this package, which say nothing to the author of the
script. MOAI_FULL_TRACEBACK=1 keeps them. Other exceptions are printed as ever.
"""

from __future__ import annotations

import os
import sys
import traceback
from types import TracebackType

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_DISPATCH = os.path.join("torch", "_ops.py")


def install() -> None:
    """Print uncaught errors that way from now on; calling it again changes nothing."""
    if getattr(sys.excepthook, "__module__", "") == __name__:
        return
    before = sys.excepthook

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if os.environ.get("MOAI_FULL_TRACEBACK") == "1" or not _passes_through_package(trace):
            before(kind, error, trace)
        else:
            print(text(error), file=sys.stderr, end="")

    sys.excepthook = show


def text(error: BaseException) -> str:
    """The traceback of `error` without the package's frames."""
    report = traceback.TracebackException.from_exception(error)
    chain: traceback.TracebackException | None = report
    while chain is not None:
        frames = [f for f in chain.stack if not f.filename.startswith(_PACKAGE) and not f.filename.endswith(_DISPATCH)]
        chain.stack = traceback.StackSummary.from_list(frames)
        chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    return "".join(report.format())


def _passes_through_package(trace: TracebackType | None) -> bool:
    while trace is not None:
        if trace.tb_frame.f_code.co_filename.startswith(_PACKAGE):
            return True
        trace = trace.tb_next
    return False
