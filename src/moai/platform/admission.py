"""Admission: when a program may start on its accelerator, and on which devices of the pool.

In: what the program is to get. Out: a `Lease` on devices, sooner or later.

A program waits while another one uses its accelerator, and while the running jobs hold so many devices that its own do
not fit in the pool. The pool is the machine's devices (`pool.names`): GPUs, or as many CPU workers as its largest
flavor has. A job that asks for more CPU workers than that has the pool to itself. Programs that wait are served by
priority (MOAI_PRIORITY, higher first), then in the order in which they came; a later small one does not overtake a
large one.
"""

from __future__ import annotations

import json
import os
import shlex
import sqlite3
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass

from moai.platform import exit_status, jobs, log, pool, processes, state, tokens
from moai.platform.accelerators import Choice
from moai.platform.device import Device
from moai.platform.errors import AcceleratorError, StateError
from moai.platform.pool import Machine

POLL_SECONDS = 0.25
PRIORITIES = range(-99, 100)


@dataclass(frozen=True, slots=True)
class Lease:
    """What a program holds while it runs: its job's id, and devices that no other job uses."""

    job_id: int
    devices: tuple[Device, ...]


@dataclass(frozen=True, slots=True)
class InUse:
    """The accelerator is another process's."""

    pid: int
    command: str


@dataclass(frozen=True, slots=True)
class PoolFull:
    """The devices are others', or will be: they came first."""


def acquire(
    choice: Choice, plan: str, environ: Mapping[str, str] = os.environ, machine: Machine | None = None
) -> Lease:
    """A job for this process on what it chose; waits until it can have it, and says why. `plan` is a line of text.

    Raises AcceleratorError for a MOAI_PRIORITY that is none and for an accelerator that was removed meanwhile,
    StateError where the state folder cannot be used.
    """
    queue = _Queue(choice, plan, _priority(environ), environ, machine or pool.probe(environ))
    answer = queue.enter()
    try:
        with log.Dots() as dots:
            told: InUse | PoolFull | None = None
            while not isinstance(answer, Lease):
                if answer != told:
                    dots.interrupt()
                    _tell(answer)
                    told = answer
                time.sleep(POLL_SECONDS)
                dots.advance()
                answer = queue.ask()
    except BaseException:
        queue.leave()
        raise
    exit_status.leave(jobs.exit_file(answer.job_id, environ))
    return answer


def _tell(obstacle: InUse | PoolFull) -> None:
    if isinstance(obstacle, InUse):
        log.in_use(obstacle.pid, obstacle.command)
    else:
        log.pool_full()


def _priority(environ: Mapping[str, str]) -> int:
    text = environ.get("MOAI_PRIORITY") or "0"
    try:
        priority = int(text)
    except ValueError:
        priority = PRIORITIES.stop
    if priority not in PRIORITIES:
        raise AcceleratorError(
            f"MOAI_PRIORITY={text}: a whole number from {PRIORITIES[0]} to {PRIORITIES[-1]} is expected."
        )
    return priority


class _Queue:
    """This process's place in the queue."""

    def __init__(self, choice: Choice, plan: str, priority: int, environ: Mapping[str, str], machine: Machine) -> None:
        self._choice = choice
        self._plan = plan
        self._priority = priority
        self._environ = environ
        self._machine = machine
        self._pid = os.getpid()
        self._birth = processes.birth(self._pid)
        self._request: int | None = None

    def enter(self) -> Lease | InUse | PoolFull:
        """Start if nothing is in the way, else queue."""
        with state.transaction(self._environ) as db:
            answer = self._try(db)
            if not isinstance(answer, Lease):
                cursor = db.execute(
                    "INSERT INTO requests (token, accelerator, pid, birth, priority) VALUES (?, ?, ?, ?, ?)",
                    (self._token(db), self._choice.accelerator, self._pid, self._birth, self._priority),
                )
                self._request = cursor.lastrowid
        return answer

    def ask(self) -> Lease | InUse | PoolFull:
        """Start if it is this process's turn."""
        with state.transaction(self._environ) as db:
            answer = self._try(db)
            if isinstance(answer, Lease):
                db.execute("DELETE FROM requests WHERE id = ?", (self._request,))
        return answer

    def leave(self) -> None:
        """Give up."""
        # If the state cannot be used now, the request goes when this process does.
        with suppress(StateError), state.transaction(self._environ) as db:
            db.execute("DELETE FROM requests WHERE pid = ? AND birth = ?", (self._pid, self._birth))

    def _token(self, db: sqlite3.Connection) -> str:
        return tokens.current(db, self._environ)

    def _try(self, db: sqlite3.Connection) -> Lease | InUse | PoolFull:
        jobs.settle(db, self._environ)
        # A program has one accelerator: what this very process held before is over.
        db.execute(
            "UPDATE jobs SET ended = ? WHERE pid = ? AND birth = ? AND ended IS NULL",
            (time.time(), self._pid, self._birth),
        )
        token = self._token(db)
        self._check_exists(db, token)
        holder = _holder(db, token, self._choice.accelerator)
        if holder is not None:
            return holder
        if self._is_next(db):
            devices = self._place(db)
            if devices is not None:
                return Lease(self._start(db, token, *devices), devices[0])
        return PoolFull()

    def _check_exists(self, db: sqlite3.Connection, token: str) -> None:
        wanted = self._choice.accelerator
        if wanted is None:
            return
        if db.execute("SELECT 1 FROM accelerators WHERE token = ? AND id = ?", (token, wanted)).fetchone() is None:
            raise AcceleratorError(f"Accelerator {wanted} has been removed. Run the program again, on another one.")

    def _is_next(self, db: sqlite3.Connection) -> bool:
        """Whether all that came first are held up by something other than the pool, or stopped."""
        ahead = db.execute(
            "SELECT token, accelerator, pid, birth FROM requests"
            " WHERE priority > ? OR priority = ? AND id < coalesce(?, id + 1)",
            (self._priority, self._priority, self._request),
        ).fetchall()
        return not any(
            processes.condition(pid, birth) == "running" and _holder(db, token, accelerator) is None
            for token, accelerator, pid, birth in ahead
        )

    def _place(self, db: sqlite3.Connection) -> tuple[tuple[Device, ...], tuple[str, ...]] | None:
        """Devices of the pool that no job holds, and their names; None if they are too few."""
        wanted = self._choice.flavor.devices
        names = pool.names(self._machine, at_least=len(wanted))
        taken = {name for (held,) in db.execute("SELECT names FROM jobs WHERE ended IS NULL") for name in held.split()}
        free = [i for i, name in enumerate(names) if name not in taken]
        if len(free) < len(wanted):
            return None
        chosen = free[: len(wanted)]
        devices = tuple(pool.at(device, i, self._machine) for device, i in zip(wanted, chosen, strict=True))
        return devices, tuple(names[i] for i in chosen)

    def _start(self, db: sqlite3.Connection, token: str, devices: tuple[Device, ...], names: tuple[str, ...]) -> int:
        cursor = db.execute(
            "INSERT INTO jobs (token, accelerator, command, pid, birth, flavor, devices, names, plan, started)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                token,
                self._choice.accelerator,
                shlex.join(sys.orig_argv),
                self._pid,
                self._birth,
                self._choice.flavor.name,
                json.dumps([asdict(d) for d in devices]),
                " ".join(names),
                self._plan,
                time.time(),
            ),
        )
        assert cursor.lastrowid is not None
        return cursor.lastrowid


def _holder(db: sqlite3.Connection, token: str, accelerator: int | None) -> InUse | None:
    """Who uses the accelerator; nobody, for one that a program has for itself."""
    row = db.execute(
        "SELECT pid, command FROM jobs WHERE token = ? AND accelerator = ? AND ended IS NULL", (token, accelerator)
    ).fetchone()
    return InUse(*row) if row else None
