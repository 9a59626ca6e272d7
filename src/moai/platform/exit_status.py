"""The exit status of this process, for others to read once it is gone.

Out: a file that stays empty while the process lives, and when it is killed; else it gets the status at the very end.

Python has no hook that is told the status: `sys.exit(3)` is an exception that is gone before `atexit` runs. The C
library's `on_exit` has one, but runs after the interpreter, so what it calls cannot be Python. `putw(status, file)`
of the same library happens to take what `on_exit` gives, and writes it.
"""

from __future__ import annotations

import ctypes
import struct
from pathlib import Path

_WORD = struct.Struct("i")


def leave(file: Path) -> None:
    """Make this process write its exit status into `file`; does nothing where that is not possible."""
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "on_exit") and hasattr(libc, "putw")):
        return
    libc.fopen.restype = ctypes.c_void_p
    libc.fopen.argtypes = (ctypes.c_char_p, ctypes.c_char_p)
    libc.on_exit.argtypes = (ctypes.c_void_p, ctypes.c_void_p)
    stream = libc.fopen(bytes(file), b"wbe")
    if stream:
        libc.on_exit(ctypes.cast(libc.putw, ctypes.c_void_p), stream)


def read(file: Path) -> int | None:
    """The status that a process which is gone left in `file`; None if it left none: it was killed."""
    try:
        words = file.read_bytes()
    except OSError:
        return None
    # Forked children that end write there too, but before their parent.
    return _WORD.unpack(words[-_WORD.size :])[0] if len(words) >= _WORD.size else None
