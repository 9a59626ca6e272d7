"""What `moreh-smi` shows, as text.

In: a `Snapshot` or the accelerators in it. Out: strings without a newline at their end. Nothing is read here: what is
drawn depends on the arguments alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from moai.cli.snapshot import Snapshot
from moai.cli.tables import Column, printable, render
from moai.platform.accelerators import Accelerator
from moai.platform.pool import MB

UNKNOWN = "-"

DEVICE = Column("Device")
NAME = Column("Name", align="right", least=21)
MODEL = Column("Model")


def status(snapshot: Snapshot) -> str:
    """The default screen: all accelerators and, while something runs, the processes."""
    versions = f"Current Version: {snapshot.version}  Latest Version: {snapshot.latest_version}"
    columns = [DEVICE, NAME, MODEL, Column("Memory Usage"), Column("Total Memory"), Column("Utilization")]
    rows = [[*_identity(a, snapshot.name), *_load(a)] for a in snapshot.accelerators]
    parts = [time_line(snapshot.now), render(columns, rows, caption=versions)]
    busy = [a for a in snapshot.accelerators if a.job is not None]
    if busy:
        parts += ["", "Processes:", _processes(busy), *_plans(busy)]
    return "\n".join(parts)


def hardware(now: float, accelerator: Accelerator, node: str) -> str:
    """The physical devices of one accelerator; `node` is the name of the machine, for devices that are idle."""
    columns = [Column(h) for h in ("Dev", "Location", "Dev Temp", "Mem Temp", "Dev Util", "Mem Util", "Mem Usage")]
    return f"{time_line(now)}\n{render(columns, _devices(accelerator, node))}"


def tokens(snapshot: Snapshot) -> str:
    """Which token the accelerators belong to."""
    columns = [DEVICE, NAME, Column("Token"), MODEL]
    rows = []
    for accelerator in snapshot.accelerators:
        device, name, model = _identity(accelerator, snapshot.name)
        rows.append([device, name, snapshot.token, model])
    return f"{time_line(snapshot.now)}\n{render(columns, rows)}"


def models(accelerators: Sequence[Accelerator], name: str) -> str:
    """The accelerators and their flavors, as shown after each change; `name` is the display name."""
    return render([DEVICE, NAME, MODEL], [_identity(a, name) for a in accelerators])


def time_line(now: float) -> str:
    """As in "12:34:56 May 01, 2024", local time; `now` in seconds since the epoch."""
    return time.strftime("%H:%M:%S %B %d, %Y", time.localtime(now))


def _identity(accelerator: Accelerator, name: str) -> list[str]:
    star = "*" if accelerator.is_default else " "
    return [f"{star} {accelerator.id}", name, accelerator.flavor.name]


def _load(accelerator: Accelerator) -> list[str]:
    if accelerator.job is None:
        return [UNKNOWN] * 3
    usage = accelerator.job.usage
    return [_mib(usage.memory_bytes), _mib(accelerator.flavor.memory_bytes), f"{_percent(usage.utilization):3d} %"]


def _processes(busy: Sequence[Accelerator]) -> str:
    columns = [
        Column("Device", align="right"),
        Column("Job ID", align="right"),
        Column("PID", align="right"),
        Column("Process"),
        Column("Memory Usage"),
    ]
    rows = [
        [str(a.id), str(a.job.id), str(a.job.pid), a.job.command, _mib(a.job.usage.memory_bytes)]
        for a in busy
        if a.job is not None
    ]
    return render(columns, rows)


def _plans(busy: Sequence[Accelerator]) -> list[str]:
    """One line a job whose plan is known."""
    lines = [f"Plan of job {a.job.id}: {printable(a.job.plan)}" for a in busy if a.job is not None and a.job.plan]
    return ["", *lines] if lines else []


def _devices(accelerator: Accelerator, node: str) -> list[list[str]]:
    if accelerator.job is None or not accelerator.job.usage.devices:
        idle = [UNKNOWN] * 5
        return [[str(i), f"{node}:{d.index}", *idle] for i, d in enumerate(accelerator.flavor.devices)]
    rows = []
    for i, device in enumerate(accelerator.job.usage.devices):
        temperature = UNKNOWN if device.temperature is None else f"{device.temperature:.0f} C"
        used = _percent(device.memory_bytes / device.total_bytes) if device.total_bytes else 0
        location = f"{device.node}:{device.index}"
        busy = f"{_percent(device.utilization)} %"
        rows.append([str(i), location, temperature, UNKNOWN, busy, UNKNOWN, f"{used} %"])
    return rows


def _mib(size: int) -> str:
    return f"{size // MB} MiB"


def _percent(share: float) -> int:
    return round(100 * share)
