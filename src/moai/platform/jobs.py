"""Jobs: which programs use, and have used, accelerators.

In: a transaction, or the environment. Out: `Job`s. A job is started by `moai.platform.admission`.

A job runs as long as its process lives and holds its devices. Nobody has to tidy up after a process that was killed:
whoever looks next sees that it is gone, and notes it.
"""

from __future__ import annotations

import json
import os
import sqlite3
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from moai.platform import exit_status, processes, state, telemetry
from moai.platform.device import Device

KILLED = "killed"
RESET = "reset"


@dataclass(frozen=True, slots=True)
class Job:
    """One program on one accelerator, as it was when this was read.

    `accelerator` is None for one of its own. Times are seconds since the epoch. `ended` is None while the job runs.
    `exit` is the status ("0") or what ended the process ("killed", "reset", "RuntimeError: ..."), None before that.
    """

    id: int
    accelerator: int | None
    command: str
    pid: int
    flavor: str
    devices: tuple[Device, ...]
    plan: str
    started: float
    ended: float | None
    exit: str | None
    tokens_per_s: float | None
    peak_bytes: int | None


_COLUMNS = "id, accelerator, command, pid, flavor, devices, plan, started, ended, exit, tokens_per_s, peak_bytes"


def history(environ: Mapping[str, str] = os.environ) -> tuple[Job, ...]:
    """All jobs of the user on this machine, oldest first. Raises StateError."""
    with state.transaction(environ) as db:
        settle(db, environ)
        rows = db.execute(f"SELECT {_COLUMNS} FROM jobs ORDER BY id").fetchall()
    return tuple(map(_job, rows))


def planned(job_id: int, plan: str, environ: Mapping[str, str] = os.environ) -> None:
    """Note the plan that was chosen for a job. Raises StateError."""
    with state.transaction(environ) as db:
        db.execute("UPDATE jobs SET plan = ? WHERE id = ?", (plan, job_id))


def finish(
    job_id: int, peak_bytes: int, tokens_per_s: float | None = None, environ: Mapping[str, str] = os.environ
) -> None:
    """Note that this process has released its devices. Raises StateError.

    If it is ending with an exception, that becomes the job's `exit`.
    """
    with state.transaction(environ) as db:
        db.execute(
            "UPDATE jobs SET ended = ?, exit = coalesce(exit, ?), peak_bytes = ?, tokens_per_s = ?"
            " WHERE id = ? AND ended IS NULL",
            (time.time(), _uncaught(), peak_bytes or None, tokens_per_s, job_id),
        )
    telemetry.forget(job_id, environ)


def running(db: sqlite3.Connection, token: str | None = None) -> tuple[Job, ...]:
    """The jobs that run now, of one token or of all. Settle first."""
    rows = db.execute(
        f"SELECT {_COLUMNS} FROM jobs WHERE ended IS NULL AND token = coalesce(?, token) ORDER BY id", (token,)
    )
    return tuple(map(_job, rows))


def settle(db: sqlite3.Connection, environ: Mapping[str, str]) -> None:
    """Note the end of the jobs and requests whose process is gone."""
    open_jobs = db.execute("SELECT id, pid, birth, started FROM jobs WHERE ended IS NULL OR exit IS NULL").fetchall()
    for job_id, pid, birth, started in open_jobs:
        if processes.condition(pid, birth) == "gone":
            _settle(db, job_id, started, environ)
    for request_id, pid, birth in db.execute("SELECT id, pid, birth FROM requests").fetchall():
        if processes.condition(pid, birth) == "gone":
            db.execute("DELETE FROM requests WHERE id = ?", (request_id,))


def exit_file(job_id: int, environ: Mapping[str, str]) -> Path:
    """Where a job's process leaves its exit status."""
    return state.job_file(job_id, ".exit", environ)


def _settle(db: sqlite3.Connection, job_id: int, started: float, environ: Mapping[str, str]) -> None:
    last = telemetry.read(job_id, environ)
    ended, peak = (last.time, last.peak_bytes or None) if last else (started, None)
    status = exit_status.read(exit_file(job_id, environ))
    db.execute(
        "UPDATE jobs SET ended = coalesce(ended, ?), exit = coalesce(exit, ?), peak_bytes = coalesce(peak_bytes, ?)"
        " WHERE id = ?",
        (ended, KILLED if status is None else str(status), peak, job_id),
    )
    telemetry.forget(job_id, environ)
    exit_file(job_id, environ).unlink(missing_ok=True)


def _uncaught() -> str | None:
    """The exception that this process is ending with, as "RuntimeError: its first line"."""
    error = getattr(sys, "last_value", None)
    if error is None:
        return None
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}" if first_line else type(error).__name__


def _job(row: tuple) -> Job:  # type: ignore[type-arg]
    fields = list(row)
    fields[5] = tuple(Device(**d) for d in json.loads(fields[5]))
    return Job(*fields)
