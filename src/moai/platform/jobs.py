"""Jobs: which programs use, and have used, an accelerator.

In: a program that starts or ends. Out: job ids, unique for the user on this machine, and the list of jobs.

Bookkeeping must not stop a training run: where the state folder cannot be written, that is said once, and the
program goes on without an id.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass

from moai.platform import state
from moai.platform.log import logger


@dataclass(frozen=True, slots=True)
class Job:
    """Times are seconds since the epoch; `ended` is None for a job that runs, or that died without saying so."""

    id: int
    command: str
    pid: int
    flavor: str
    started: float
    ended: float | None


def start(command: str, flavor: str, environ: Mapping[str, str] = os.environ) -> int | None:
    """Register this process as a job; its id, or None where the state folder cannot be written."""
    try:
        with state.connect(environ) as connection:
            cursor = connection.execute(
                "INSERT INTO jobs (command, pid, flavor, started) VALUES (?, ?, ?, ?)",
                (command, os.getpid(), flavor, time.time()),
            )
            return cursor.lastrowid
    except (OSError, sqlite3.Error) as error:
        logger.warning(
            "No job ID: the state folder %s cannot be written (%s). Set XDG_STATE_HOME to a folder that can be.",
            state.database(environ).parent,
            error,
        )
        return None


def finish(job_id: int | None, environ: Mapping[str, str] = os.environ) -> None:
    """Note the end of a job that `start` has registered (None: it has not)."""
    if job_id is None:
        return
    try:
        with state.connect(environ) as connection:
            connection.execute("UPDATE jobs SET ended = ? WHERE id = ?", (time.time(), job_id))
    except (OSError, sqlite3.Error) as error:
        logger.warning("The end of job %d could not be noted in %s (%s).", job_id, state.database(environ), error)


def history(environ: Mapping[str, str] = os.environ) -> tuple[Job, ...]:
    """All jobs of the user on this machine, oldest first.

    Raises OSError or sqlite3.Error where the state folder cannot be read.
    """
    with state.connect(environ) as connection:
        rows = connection.execute("SELECT id, command, pid, flavor, started, ended FROM jobs ORDER BY id").fetchall()
    return tuple(Job(*row) for row in rows)
