"""What a job's devices do, as others see it."""

import threading
import time
from dataclasses import dataclass

import pytest

from moai.platform import state, telemetry
from moai.platform.device import Device
from moai.platform.pool import GB

DEVICES = [Device("cpu", i, 4 * GB, 1) for i in (2, 3)]


@dataclass
class Report:
    memory: int
    peak: int
    busy: float


@pytest.fixture
def publisher(environ):
    """A function that starts to publish for job 1 what its argument gives."""
    with state.transaction(environ):
        pass  # makes the folder
    started = []

    def start(reports):
        started.append(telemetry.Publisher(1, DEVICES, reports, environ))
        return started[-1]

    yield start
    for one in started:
        one.stop()


def wait_for(condition):
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_before_the_first_report_nothing_is_held(environ, publisher):
    assert telemetry.usage(1, environ) == telemetry.NOTHING
    publisher(lambda: [None, None])
    wait_for(lambda: telemetry.usage(1, environ).devices)
    assert telemetry.usage(1, environ).memory_bytes == 0


def test_new_reports_are_seen_within_two_seconds(environ, publisher):
    reports = [Report(GB, GB, 0.5), Report(GB, GB, 1.0)]
    publisher(lambda: reports)
    wait_for(lambda: telemetry.usage(1, environ).memory_bytes == 2 * GB)
    assert telemetry.usage(1, environ).utilization == 0.75
    reports[0] = Report(3 * GB, 3 * GB, 0.0)
    began = time.monotonic()
    wait_for(lambda: telemetry.usage(1, environ).memory_bytes == 4 * GB)
    assert time.monotonic() - began < 2


def test_the_peak_is_the_most_that_all_devices_ever_held(environ, publisher):
    reports = [Report(1, 5, 0), Report(1, 7, 0)]
    one = publisher(lambda: reports)
    one.publish()
    reports[:] = [Report(0, 5, 0), None]
    one.publish()
    assert one.peak_bytes == 12
    assert telemetry.read(1, environ).peak_bytes == 12


def test_a_process_that_is_stopped_is_not_busy(environ, publisher, monkeypatch):
    one = publisher(lambda: [Report(GB, GB, 1.0)] * 2)
    wait_for(lambda: telemetry.usage(1, environ).utilization == 1.0)
    one.stop()
    monkeypatch.setattr(telemetry, "FRESH_SECONDS", 0.0)
    assert telemetry.usage(1, environ).utilization == 0.0
    assert telemetry.usage(1, environ).memory_bytes == 2 * GB


def test_a_reader_never_sees_half_a_record(environ, publisher):
    one = publisher(lambda: [Report(GB, GB, 1.0)] * 2)
    one.publish()
    over = threading.Event()

    def write():
        while not over.is_set():
            one.publish()

    thread = threading.Thread(target=write)
    thread.start()
    seen = [telemetry.read(1, environ) for _ in range(2000)]
    over.set()
    thread.join()
    assert None not in seen


def test_a_folder_that_is_gone_ends_the_telling_not_the_program(environ, publisher, caplog, monkeypatch):
    monkeypatch.setattr(telemetry.logger, "propagate", True)
    (state.folder(environ) / "jobs").rmdir()
    publisher(lambda: [None, None])
    wait_for(lambda: "cannot be told to others" in caplog.text)
