"""What a running job's workers hold and do, told by the job's process and read by everybody else.

In: the workers' last reports, once a second. Out: `Usage`.

It goes through a small file a job in the state folder, replaced as a whole: a reader never sees half of it, no reader
can hold up a training run, and nothing waits for a disk.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from moai.platform import state
from moai.platform.device import Device

PERIOD_SECONDS = 1.0
FRESH_SECONDS = 5.0  # a process that has said nothing for longer is stopped: its workers are taken to be idle

logger = logging.getLogger("moai")


class Report(Protocol):
    """What a worker says of its last second: bytes held, the most ever held, busy share from 0 to 1."""

    @property
    def memory(self) -> int: ...
    @property
    def peak(self) -> int: ...
    @property
    def busy(self) -> float: ...


@dataclass(frozen=True, slots=True)
class DeviceUsage:
    """One device of a running job: bytes, busy share of the last second from 0 to 1, degrees Celsius if known."""

    node: str
    index: int
    memory_bytes: int
    total_bytes: int
    utilization: float
    temperature: float | None


@dataclass(frozen=True, slots=True)
class Usage:
    """All devices of a running job: bytes held, and the mean busy share of the last second, from 0 to 1."""

    memory_bytes: int
    utilization: float
    devices: tuple[DeviceUsage, ...]


NOTHING = Usage(0, 0.0, ())


@dataclass(frozen=True, slots=True)
class Record:
    """What a job's file holds: when it was written (seconds since the epoch), the most bytes ever held, the devices."""

    time: float
    peak_bytes: int
    devices: tuple[DeviceUsage, ...]


class Publisher:
    """Writes the record of job `job_id` once a second, from a thread of its own, until it is stopped.

    `reports` gives each device's last report, None where there is none yet.
    """

    def __init__(
        self,
        job_id: int,
        devices: Sequence[Device],
        reports: Callable[[], Sequence[Report | None]],
        environ: Mapping[str, str] = os.environ,
    ) -> None:
        self._file = _file(job_id, environ)
        self._devices = tuple(devices)
        self._reports = reports
        self._node = socket.gethostname()
        self._over = threading.Event()
        self._writing = threading.Lock()
        self.peak_bytes = 0
        self._thread = threading.Thread(target=self._run, name="moai-telemetry", daemon=True)
        self._thread.start()

    def publish(self) -> None:
        """Write the record now, from any thread. Raises OSError where the state folder cannot be written."""
        with self._writing:
            self._publish()

    def _publish(self) -> None:
        reports = self._reports()
        self.peak_bytes = max(self.peak_bytes, sum(r.peak for r in reports if r is not None))
        devices = tuple(self._usage(d, r) for d, r in zip(self._devices, reports, strict=True))
        record = Record(time.time(), self.peak_bytes, devices)
        draft = self._file.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(record)))
        draft.replace(self._file)

    def stop(self) -> None:
        """Writes a last record."""
        self._over.set()
        self._thread.join(PERIOD_SECONDS)

    def _run(self) -> None:
        try:
            self.publish()
            while not self._over.wait(PERIOD_SECONDS):
                self.publish()
            self.publish()  # the peak of the last second
        except OSError as error:
            logger.warning("What the devices do cannot be told to others: %s.", error)

    def _usage(self, device: Device, report: Report | None) -> DeviceUsage:
        memory, busy = (0, 0.0) if report is None else (report.memory, report.busy)
        return DeviceUsage(self._node, device.index, memory, device.memory_bytes, busy, None)


def read(job_id: int, environ: Mapping[str, str] = os.environ) -> Record | None:
    """The last record of a job, if there is one."""
    try:
        fields = json.loads(_file(job_id, environ).read_text())
        return Record(fields["time"], fields["peak_bytes"], tuple(DeviceUsage(**d) for d in fields["devices"]))
    except (OSError, ValueError, KeyError, TypeError):  # not there yet, or not ours: nothing is known
        return None


def usage(job_id: int, environ: Mapping[str, str] = os.environ) -> Usage:
    """What a running job holds and does now."""
    record = read(job_id, environ)
    if record is None or not record.devices:
        return NOTHING
    fresh = time.time() - record.time <= FRESH_SECONDS
    busy = sum(d.utilization for d in record.devices) / len(record.devices) if fresh else 0.0
    return Usage(sum(d.memory_bytes for d in record.devices), busy, record.devices)


def forget(job_id: int, environ: Mapping[str, str] = os.environ) -> None:
    """Remove a job's record."""
    _file(job_id, environ).unlink(missing_ok=True)


def _file(job_id: int, environ: Mapping[str, str]) -> Path:
    return state.job_file(job_id, ".json", environ)
