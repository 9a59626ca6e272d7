"""Which processes live.

In: a pid and the process's birth mark. Out: whether that very process, not a later one with its pid, is there.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Literal

Condition = Literal["running", "stopped", "gone"]


def birth(pid: int) -> str:
    """A mark that no other process of this machine has had under this pid; "" if there is no such process."""
    return _look(pid)[0]


def condition(pid: int, mark: str) -> Condition:
    """Of the process `pid` that was born with `mark`. A zombie is gone; "stopped" is what Ctrl-Z does."""
    found, state = _look(pid)
    if not found or found != mark or state in "ZX":
        return "gone"
    return "stopped" if state in "Tt" else "running"


def _look(pid: int) -> tuple[str, str]:
    """(birth mark, one-letter state as in /proc)."""
    try:
        # The command, in parentheses, may hold anything; the state is the first field after it, the start the 20th.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        return f"{_boot()}/{fields[19]}", fields[0]
    except (OSError, IndexError):
        return _ask(pid) if not _boot() else ("", "")


def _ask(pid: int) -> tuple[str, str]:
    """The same on a system without /proc."""
    import psutil

    try:
        process = psutil.Process(pid)
        with process.oneshot():
            states = {psutil.STATUS_ZOMBIE: "Z", psutil.STATUS_STOPPED: "T"}
            return f"{process.create_time():.2f}", states.get(process.status(), "R")
    except psutil.Error:
        return "", ""


@lru_cache(maxsize=1)
def _boot() -> str:
    """What tells this run of the system from others; "" where there is no /proc."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
