"""`moai profile`: measures the devices of the accelerator that a program would get.

In: the environment, as for a program. Out: a Profile, kept in a file. While it is measured the devices are this
process's, as a job; it ends with nothing kept where it is interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from moai.platform import accelerators, admission, jobs, log
from moai.platform.accelerators import AcceleratorError
from moai.platform.device import Device
from moai.platform.progress import Waiting

if TYPE_CHECKING:
    from moai.plan.profile import Profile

# What is measured is plain PyTorch, here as well as on the workers: a region that one of them compiles would not be.
_PLAIN = {"MOAI_COMPILE": "never", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
_SHOWN = ("add", "gelu", "_fused_adamw")  # of the operators, in the summary


def measure(environ: Mapping[str, str]) -> tuple[Profile, Path]:
    """A new profile, and the file it is kept in. Waits until the devices are free. AcceleratorError, in one line, where
    there are none or one fails; OSError where the file cannot be written."""
    try:
        choice = accelerators.choose(environ)
    except (ValueError, RuntimeError) as error:
        raise AcceleratorError(str(error)) from error
    log.install()
    lease = admission.acquire(choice, "profile", environ)
    try:
        with _environment(_PLAIN):
            return _measured(lease.devices, environ)
    except RuntimeError as error:
        raise AcceleratorError(str(error)) from error
    finally:
        jobs.finish(lease.job_id, 0, environ=environ)


def _measured(devices: Sequence[Device], environ: Mapping[str, str]) -> tuple[Profile, Path]:
    with Waiting("Starting the devices"):
        from moai.profiling import store
        from moai.profiling.measuring import STANDARD, Measurement
        from moai.runtime.accelerator import Accelerator

        accelerator = Accelerator(devices)
    try:
        measurement = Measurement(accelerator, store.hardware(devices), STANDARD[devices[0].kind])
        with Waiting("Measuring the devices", total=measurement.steps) as progress:
            profile = measurement.run(progress.advance)
    finally:
        accelerator.close()
    return profile, store.save(profile, environ)


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in changes}
    os.environ.update(changes)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def summary(profile: Profile) -> Table:
    """The best of each kind that was measured."""
    hardware = profile.hardware
    table = Table("Measured", "At best", box=box.SIMPLE_HEAD, title_justify="left")
    table.title = f"{hardware.devices} x {hardware.model}, {hardware.threads} thread(s) each, all at work at once"
    for name, measured in profile.tables.items():
        kind, *rest = name.split()
        points = list(measured.points())
        if kind == "matmul":
            rate = max(2.0 * m * n * k / s for (m, n, k), s in points)
            table.add_row(f"matrix products {rest[0]}", _gigas(rate, "FLOP"))
        elif kind == "attention":
            table.add_row(name, _gigas(max(flops_a_byte * size / s for (flops_a_byte, size), s in points), "FLOP"))
        elif kind != "stream" or rest[0] in _SHOWN:
            table.add_row(name.removeprefix("stream "), _gigas(max(size / s for (size,), s in points), "B"))
    table.add_row("a call", f"{profile.call_s * 1e6:,.1f} us")
    table.add_row("of a message's time, lost by computing beside it", f"{profile.overlap_slowdown:.0%}")
    return table


def _gigas(rate: float, what: str) -> str:
    return f"{rate / 1e9:,.1f} G{what}/s"
