"""`moai profile`: measures the devices of the accelerator that a program would get, and layers of a model on them.

In: the environment, as for a program; a training step, if one is named. Out: a Profile, kept in a file. While it is
measured the devices are this process's, as a job; it ends with nothing kept where it is interrupted.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from moai.cli.plan.run import capture
from moai.cli.script import check_script
from moai.platform import accelerators, admission, clusters, jobs, log
from moai.platform.accelerators import AcceleratorError
from moai.platform.device import Device
from moai.platform.progress import Waiting

if TYPE_CHECKING:
    from moai.dry.messages import ModelStep
    from moai.dry.session import Captured
    from moai.plan.in_place import TimedTask
    from moai.plan.profile import Profile
    from moai.runtime.accelerator import Accelerator

# What is measured is plain PyTorch, here as well as on the workers: a region that one of them compiles would not be.
_PLAIN = {"MOAI_COMPILE": "never", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
_SHOWN = ("add", "gelu", "_fused_adamw")  # of the operators, in the summary


def measure(
    environ: Mapping[str, str], step: ModelStep | Sequence[str] | None, seconds: float, verbose: bool
) -> tuple[Profile, Path]:
    """A new profile, and the file it is kept in; for a `step`, the one that there is with what layers of the step take.
    Waits until the devices are free. AcceleratorError, in one line, where there are none, one fails, or there is no
    such step; OSError where the file cannot be written."""
    if isinstance(step, Sequence):
        check_script(step[0])
    try:
        choice = accelerators.choose(environ)
    except (ValueError, RuntimeError) as error:
        raise AcceleratorError(str(error)) from error
    log.install()
    memory = sum(device.memory_bytes for device in choice.flavor.devices)
    captured = None if step is None else capture(step, memory, seconds, verbose)
    lease = admission.acquire(choice, "profile", environ)
    try:
        with _environment(_PLAIN):
            return _measured(lease.devices, captured, environ)
    except RuntimeError as error:
        raise AcceleratorError(str(error)) from error
    finally:
        jobs.finish(lease.job_id, 0, environ=environ)


def _measured(devices: Sequence[Device], captured: Captured | None, environ: Mapping[str, str]) -> tuple[Profile, Path]:
    with Waiting("Starting the devices"):
        from moai.profiling import store
        from moai.runtime.accelerator import Accelerator

        known = store.find(devices, environ)
        accelerator = Accelerator(devices)
    try:
        if captured is None or known is None:
            before = () if known is None else known.tasks
            known = _general(accelerator).with_tasks(before)
        if captured is not None:
            known = known.with_tasks(_of_layers(accelerator, captured))
    finally:
        accelerator.close()
    return known, store.save(known, environ)


def _general(accelerator: Accelerator) -> Profile:
    from moai.profiling import store
    from moai.profiling.measuring import STANDARD, Measurement

    devices = accelerator.devices
    measurement = Measurement(accelerator, store.hardware(devices), STANDARD[devices[0].kind])
    with Waiting("Measuring the devices", total=measurement.steps) as progress:
        return measurement.run(progress.advance)


def _of_layers(accelerator: Accelerator, captured: Captured) -> Sequence[TimedTask]:
    from moai.cli.plan.choosing import precision
    from moai.profiling.layers import LayerMeasurement

    with Waiting("Preparing the layers"):
        cluster = clusters.of_devices(accelerator.devices)
        measurement = LayerMeasurement(accelerator, captured.graph, precision(captured.options, cluster))
    with Waiting("Measuring the layers", total=measurement.steps) as progress:
        return measurement.run(progress.advance)


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
    if profile.tasks:
        table.add_row("tasks of models, timed in their layers", f"{len(profile.tasks):,}")
    table.add_row("of a message's time, lost by computing beside it", f"{profile.overlap_slowdown:.0%}")
    return table


def _gigas(rate: float, what: str) -> str:
    return f"{rate / 1e9:,.1f} G{what}/s"
