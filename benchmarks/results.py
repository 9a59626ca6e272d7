"""What the benchmarks have in common at their end: quartiles, the machine, JSON files, and the record of past runs."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.child import ROOT

RECORD = ROOT / "benchmarks" / "RESULTS.md"


def quartiles(values: Iterable[float]) -> dict[str, float]:
    """{"median", "q25", "q75"} of at least one value, with linear interpolation."""
    known = list(values)
    if len(known) == 1:
        return {"median": known[0], "q25": known[0], "q75": known[0]}
    q25, median, q75 = statistics.quantiles(known, n=4, method="inclusive")
    return {"median": median, "q25": q25, "q75": q75}


def spread(figures: Mapping[str, float], scale: float = 1.0, digits: int = 3) -> str:
    """Quartiles as "median (q25-q75)"."""
    median, q25, q75 = (f"{figures[k] * scale:.{digits}f}" for k in ("median", "q25", "q75"))
    return f"{median} ({q25}-{q75})"


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table, with a cell in every row for each of `head`."""
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def provenance() -> dict[str, Any]:
    """Commit (with a "+" where files in src/ differ from it), UTC date and hardware of this run."""
    commit = _git("rev-parse", "--short", "HEAD") or "unknown"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", "src")
    return {
        "commit": commit + ("+" if changed else ""),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30),
        "torch": torch.__version__,
    }


def write_json(path: Path, figures: Mapping[str, Any]) -> None:
    """Write the file whole or not at all."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(figures, indent=2) + "\n")
    partial.replace(path)


def record(title: str, text: str, run: Mapping[str, Any]) -> None:
    """Append an entry to RESULTS.md; `run` is what `provenance` gave."""
    hardware = f"{run['cpu']}, {run['cores']} cores, {run['memory_gib']} GiB; torch {run['torch']}"
    with RECORD.open("a") as file:
        file.write(f"\n## {title}: {run['date']}, commit {run['commit']}\n\n{hardware}\n\n{text}\n")


def cpu_seconds(pid: int) -> float:
    """CPU time so far of a process and of all that it started, in steps of 10 ms."""
    root = psutil.Process(pid)
    total = 0.0
    for process in (root, *root.children(recursive=True)):
        used = process.cpu_times()
        total += used.user + used.system + used.children_user + used.children_system
    return total


def peak_bytes(pid: int) -> int:
    """The most resident memory that a process has had so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) << 10
    raise RuntimeError(f"/proc/{pid}/status does not tell the process's peak memory")


def workers(pid: int) -> list[int]:
    """The process ids of the workers that a script has."""
    return [child.pid for child in psutil.Process(pid).children() if "moai.runtime.worker" in child.cmdline()]


class Neighbours:
    """How much of the machine other programs took since the object was made: the reason to trust figures, or not."""

    def __init__(self) -> None:
        self._before = self._used()

    def share(self) -> float:
        """Their CPU time over that of all cores."""
        (all_, busy, own), (all_0, busy_0, own_0) = self._used(), self._before
        return max(0.0, (busy - busy_0) - (own - own_0)) / max(all_ - all_0, 1e-9)

    @staticmethod
    def _used() -> tuple[float, float, float]:
        """CPU seconds so far: offered by the machine, used of it, used by this process and those that it started."""
        times = psutil.cpu_times()
        idle = times.idle + getattr(times, "iowait", 0.0)
        own = cpu_seconds(os.getpid())
        # `guest` is part of `user` already.
        all_ = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return all_, all_ - idle, own


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=10
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
