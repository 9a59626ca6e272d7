"""The tables of `moai`, drawn by Rich.

In: a snapshot, jobs, or checks. Out: something that `show` prints.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

from moai.cli.doctor import Check
from moai.cli.snapshot import Snapshot
from moai.cli.tables import printable
from moai.platform.jobs import Job
from moai.platform.pool import MB

UNKNOWN = "-"
FILE_WIDTH = 200  # columns of a table that is not printed on a terminal


def show(report: RenderableType) -> None:
    """Print it to stdout; into a pipe or a file it is as wide as it needs to be."""
    fixed = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if fixed else FILE_WIDTH)
    with console.capture() as captured:  # Rich would end the program, silently, if stdout's reader went away
        console.print(report)
    print(captured.get(), end="")


def status(look: Snapshot) -> Table:
    table = empty_table("Device", "Flavor", "Devices", "Memory (MiB)", "Busy", "Job", "PID", "Process", "Plan", "Since")
    table.title = Text(f"{look.name}, version {look.version or UNKNOWN}")
    for accelerator in look.accelerators:
        star = "* " if accelerator.is_default else "  "
        flavor, job = accelerator.flavor, accelerator.job
        total = flavor.memory_bytes // MB
        identity = [f"{star}{accelerator.id}", flavor.name, str(flavor.n_devices)]
        if job is None:
            add_row(table, [*identity, f"{UNKNOWN} / {total:,}", *[UNKNOWN] * 6])
            continue
        memory = f"{job.usage.memory_bytes // MB:,} / {total:,}"
        busy = f"{job.usage.utilization:.0%}"
        since = _time(job.started)
        add_row(table, [*identity, memory, busy, str(job.id), str(job.pid), job.command, job.plan or UNKNOWN, since])
    return table


def jobs(history: Sequence[Job]) -> RenderableType:
    if not history:
        return "No jobs yet."
    table = empty_table("Job", "Process", "Flavor", "Plan", "Started", "Took", "Exit", "Tokens/s", "Peak (MiB)")
    for job in history:
        speed = UNKNOWN if job.tokens_per_s is None else f"{job.tokens_per_s:,.0f}"
        peak = UNKNOWN if job.peak_bytes is None else f"{job.peak_bytes // MB:,}"
        took = UNKNOWN if job.ended is None else _duration(job.ended - job.started)
        end = UNKNOWN if job.exit is None else str(job.exit)
        plan = job.plan or UNKNOWN
        add_row(table, [str(job.id), job.command, job.flavor, plan, _time(job.started), took, end, speed, peak])
    return table


def doctor(checks: Sequence[Check]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for check in checks:
        verdict = Text("ok", style="green") if check.ok else Text("problem", style="bold red")
        table.add_row(verdict, Text(check.name), Text(printable(check.found)))
        if not check.ok:
            table.add_row("", "", Text(f"-> {printable(check.advice)}", style="bold"))
    return table


def empty_table(*headers: str, right: Sequence[int] = ()) -> Table:
    """An empty table; the columns in `right` are numbers."""
    made = Table(*headers, box=box.SIMPLE_HEAD, title_justify="left")
    for at in right:
        made.columns[at].justify = "right"
    return made


def add_row(table: Table, cells: list[str]) -> None:
    """Cells as they are: a command line may hold what Rich takes for markup, or for a line's end."""
    table.add_row(*[Text(printable(cell)) for cell in cells])


def _time(epoch: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(epoch))


def _duration(seconds: float) -> str:
    """As in 1:02:03: hours, minutes, seconds."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"
