"""Jobs: what is known of programs that run and have run."""

import os
import signal
import time

import pytest

from moai.platform import jobs, state, telemetry
from moai.platform.accelerators import accelerators
from moai.platform.device import Device
from moai.platform.errors import StateError
from tests.platform.programs import HOLD


def ended(environ):
    """The only job, once nobody doubts its end."""
    (job,) = jobs.history(environ)
    assert job.ended is not None
    return job


def test_a_running_job_is_known(environ, start):
    before = time.time()
    program = start()
    job_id, _ = program.lease()
    (job,) = jobs.history(environ)
    assert (job.id, job.accelerator, job.pid, job.flavor, job.plan) == (
        job_id,
        0,
        program.pid,
        "Medium.8GB",
        "one plan",
    )
    assert "-c" in job.command
    assert before <= job.started <= time.time()
    assert (job.ended, job.exit, job.tokens_per_s, job.peak_bytes) == (None, None, None, None)


@pytest.mark.parametrize(
    ("body", "exit"),
    [
        ("", "0"),
        ("sys.exit(3)", "3"),
        ("raise SystemExit(4)", "4"),
        ("import os; os.kill(os.getpid(), 9)", "killed"),
        ("try: sys.exit(5)\nexcept SystemExit: pass", "0"),
    ],
)
def test_a_job_ends_with_its_process_and_keeps_its_exit_status(environ, start, body, exit):
    program = start(body)
    program.end()
    assert ended(environ).exit == exit


def test_an_exception_that_ends_a_program_is_its_jobs_exit(environ, start):
    body = "import atexit\nfrom moai.platform import jobs\natexit.register(jobs.finish, lease.job_id, 7)\n"
    start(body + "raise ValueError('first line\\nsecond line')").end()
    job = ended(environ)
    assert (job.exit, job.peak_bytes) == ("ValueError: first line", 7)


def test_a_job_that_has_released_its_devices_gets_its_status_later(environ, start):
    program = start(f"from moai.platform import jobs\njobs.finish(lease.job_id, 0)\n{HOLD}")
    program.lease()
    deadline = time.monotonic() + 10
    while jobs.history(environ)[0].ended is None:
        assert time.monotonic() < deadline
    assert ended(environ).exit is None
    program.end()
    assert ended(environ).exit == "0"


def test_a_zombie_is_gone(environ, start):
    program = start()
    program.lease()
    program.kill()  # and nobody waits for it
    deadline = time.monotonic() + 2
    while accelerators(environ)[0].job is not None:
        assert time.monotonic() < deadline
    assert ended(environ).exit == "killed"


def test_a_stopped_job_still_runs(environ, start):
    program = start()
    program.lease()
    program.signal(signal.SIGSTOP)
    assert accelerators(environ)[0].job.pid == program.pid
    program.signal(signal.SIGCONT)


def test_another_process_with_the_pid_of_a_job_is_not_the_job(environ, start):
    program = start()
    program.lease()
    with state.transaction(environ) as db:
        db.execute("UPDATE jobs SET pid = ?", (os.getpid(),))
    assert ended(environ).exit == "killed"


def test_a_killed_job_ended_at_its_last_sign_of_life_and_keeps_its_peak(environ, start):
    program = start()
    job_id, _ = program.lease()
    publisher = telemetry.Publisher(job_id, [Device("cpu", 0, 100, 1)], lambda: [Report(memory=5, peak=9)], environ)
    publisher.stop()
    said = telemetry.read(job_id, environ).time
    program.reap()
    job = ended(environ)
    assert (job.ended, job.peak_bytes) == (said, 9)


class Report:
    def __init__(self, memory, peak, busy=0.0):
        self.memory, self.peak, self.busy = memory, peak, busy


def test_a_job_leaves_no_files_behind(environ, start):
    program = start()
    job_id, _ = program.lease()
    telemetry.Publisher(job_id, [], list, environ).stop()
    program.end()
    ended(environ)
    assert list((state.folder(environ) / "jobs").iterdir()) == []


def test_an_id_is_never_given_twice(environ, start):
    ids = []
    for _ in range(2):
        program = start()
        ids.append(program.lease()[0])
        program.end()
    assert ids == [1, 2]


def test_a_state_folder_that_cannot_be_written_is_said_in_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StateError, match=r"^The state folder .* Make it writable, or set XDG_STATE_HOME") as error:
        jobs.history({"XDG_STATE_HOME": str(file)})
    assert "\n" not in str(error.value)


def test_without_xdg_state_home_the_state_lies_under_home(tmp_path):
    jobs.history({"HOME": str(tmp_path)})
    assert (tmp_path / ".local" / "state" / "moai" / "platform.sqlite3").exists()
