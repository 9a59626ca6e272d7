"""Jobs: which programs use, and have used, an accelerator.

In: a program that starts or ends. Out: its `Job`, with an id that no other program of the user on this machine has, and
the list of all jobs.

Bookkeeping must not stop a training run: where the state folder cannot be written, that is said, and the program
goes on without a job.
"""

from __future__ import annotations

import os
import shlex
import sqlite3
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from moai.platform import state
from moai.platform.log import logger


@dataclass(frozen=True, slots=True)
class Job:
    """One program on one accelerator, as it was when this was read.

    Times are seconds since the epoch; `ended` is None for a job that runs, or that died without saying so.
    """

    id: int
    command: str
    pid: int
    flavor: str
    started: float
    ended: float | None

    def end(self, environ: Mapping[str, str] = os.environ) -> None:
        """Note that the job is over."""
        try:
            with state.connect(environ) as connection:
                connection.execute("UPDATE jobs SET ended = ? WHERE id = ?", (time.time(), self.id))
        except (OSError, sqlite3.Error) as error:
            logger.warning("The end of job %d could not be noted in %s (%s).", self.id, state.database(environ), error)


def start(flavor: str, environ: Mapping[str, str] = os.environ) -> Job | None:
    """Register this process as a job on an accelerator of `flavor`; None where the state folder cannot be written."""
    command, pid, started = shlex.join(sys.orig_argv), os.getpid(), time.time()
    try:
        with state.connect(environ) as connection:
            cursor = connection.execute(
                "INSERT INTO jobs (command, pid, flavor, started) VALUES (?, ?, ?, ?)", (command, pid, flavor, started)
            )
            job_id = cursor.lastrowid
    except (OSError, sqlite3.Error) as error:
        logger.warning(
            "No job ID: the state folder %s cannot be written (%s). Set XDG_STATE_HOME to a folder that can be.",
            state.database(environ).parent,
            error,
        )
        return None
    assert job_id is not None
    return Job(job_id, command, pid, flavor, started, None)


def history(environ: Mapping[str, str] = os.environ) -> tuple[Job, ...]:
    """All jobs of the user on this machine, oldest first.

    Raises OSError or sqlite3.Error where the state folder cannot be read.
    """
    with state.connect(environ) as connection:
        rows = connection.execute("SELECT id, command, pid, flavor, started, ended FROM jobs ORDER BY id").fetchall()
    return tuple(Job(*row) for row in rows)
