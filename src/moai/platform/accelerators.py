"""Accelerators: those that a token has, which of them a program gets, and what runs on them.

In: the environment (MOREH_SDA_TOKEN, MOREH_VISIBLE_DEVICE or MOREH_VISIBLE_DEVICES, MOAI_FLAVOR, MOAI_DEVICES) and the
shared state. Out: `Accelerator`s, a program's `Choice`. Nothing here imports torch.

All functions raise AcceleratorError, whose text is one line for a person: for what cannot be done, for a token that
does not exist, for a state folder that cannot be used.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from moai.platform import flavors, jobs, pool, processes, state, telemetry, tokens
from moai.platform.errors import AcceleratorError as AcceleratorError
from moai.platform.errors import StateError
from moai.platform.flavors import Flavor
from moai.platform.jobs import Job
from moai.platform.pool import Machine
from moai.platform.telemetry import DeviceUsage as DeviceUsage
from moai.platform.telemetry import Usage as Usage

MOST_ACCELERATORS = 5
# The accelerator of a program that has one of its own gets an id that is apart from the others, and goes with it.
OWN_IDS = 1000
TERM_SECONDS = 5.0  # from the request to end to the order
KILL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class RunningJob:
    """The program that uses an accelerator. `started` is in seconds since the epoch, `plan` one line, maybe ""."""

    id: int
    pid: int
    command: str
    plan: str
    started: float
    usage: Usage


@dataclass(frozen=True, slots=True)
class Accelerator:
    """`is_default`: programs that name none get it. `job` is None while nothing runs on it."""

    id: int
    flavor: Flavor
    is_default: bool
    job: RunningJob | None


@dataclass(frozen=True, slots=True)
class Choice:
    """What a program gets: one of the token's accelerators by its id, or one of its own (None)."""

    accelerator: int | None
    flavor: Flavor


def accelerators(environ: Mapping[str, str] = os.environ) -> tuple[Accelerator, ...]:
    """The token's accelerators by id, a first one if there was none; then those that programs have for themselves."""
    with state.transaction(environ) as db:
        token = tokens.current(db, environ)
        jobs.settle(db, environ)
        rows, default = _rows(db, token), _default(db, token)
        running = jobs.running(db, token)
    machine = pool.probe(environ)
    offered = flavors.available(machine, environ)
    jobs_of = {job.accelerator: job for job in running if job.accelerator is not None}
    listed = [
        Accelerator(
            id,
            _resolved(name, offered, machine) or _without_devices(name),
            id == default,
            _running(jobs_of.get(id), environ),
        )
        for id, name in rows
    ]
    own = [
        Accelerator(OWN_IDS + j.id, _flavor_of(j), False, _running(j, environ))
        for j in running
        if j.accelerator is None
    ]
    return (*listed, *own)


def selected(environ: Mapping[str, str] = os.environ) -> Accelerator:
    """The one that MOREH_VISIBLE_DEVICE names, else the default one."""
    listed = accelerators(environ)
    id = _visible(environ)
    for accelerator in listed:
        if accelerator.is_default if id is None else accelerator.id == id:
            return accelerator
    assert id is not None, "a token has a default accelerator"
    raise _unknown(id, [a.id for a in listed])


def add(flavor: Flavor, environ: Mapping[str, str] = os.environ) -> Accelerator:
    """A new accelerator. Ids are never given twice; the default stays what it was."""
    with state.transaction(environ) as db:
        token = tokens.current(db, environ)
        if len(_rows(db, token)) >= MOST_ACCELERATORS:
            raise AcceleratorError(f"No more than {MOST_ACCELERATORS} accelerators are possible. Remove one first.")
        (id,) = db.execute("SELECT next_accelerator FROM tokens WHERE token = ?", (token,)).fetchone()
        db.execute("UPDATE tokens SET next_accelerator = ? WHERE token = ?", (id + 1, token))
        db.execute("INSERT INTO accelerators VALUES (?, ?, ?)", (token, id, flavor.name))
    return Accelerator(id, flavor, False, None)


def remove(id: int, environ: Mapping[str, str] = os.environ) -> None:
    """Remove an accelerator that is not in use. If it was the default, the lowest id of the others is, from now on."""
    with state.transaction(environ) as db:
        token = tokens.current(db, environ)
        _require_idle(db, token, id, "removed", environ)
        others = [other for other, _ in _rows(db, token) if other != id]
        if not others:
            raise AcceleratorError(f"Accelerator {id} is the only one and cannot be removed. Add another one first.")
        db.execute("DELETE FROM accelerators WHERE token = ? AND id = ?", (token, id))
        if _default(db, token) == id:
            _set_default(db, token, others[0])


def switch(id: int, environ: Mapping[str, str] = os.environ) -> None:
    """Make an accelerator that is not in use the default one."""
    with state.transaction(environ) as db:
        token = tokens.current(db, environ)
        _require_idle(db, token, id, "switched to", environ)
        _set_default(db, token, id)


def set_flavor(flavor: Flavor, environ: Mapping[str, str] = os.environ) -> Accelerator:
    """Give another flavor to the default accelerator, or the one that MOREH_VISIBLE_DEVICE names; not while in use."""
    with state.transaction(environ) as db:
        token = tokens.current(db, environ)
        id = _visible(environ)
        default = _default(db, token)
        id = default if id is None else id
        _require_idle(db, token, id, "switched to another model", environ)
        db.execute("UPDATE accelerators SET flavor = ? WHERE token = ? AND id = ?", (flavor.name, token, id))
    return Accelerator(id, flavor, id == default, None)


def reset(environ: Mapping[str, str] = os.environ) -> bool:
    """End the program that uses the default accelerator, or the one that MOREH_VISIBLE_DEVICE names.

    Returns once it is gone, after ten seconds at the most; False if nothing ran.
    """
    with state.transaction(environ) as db:
        token = tokens.current(db, environ)
        jobs.settle(db, environ)
        id = _visible(environ)
        job = _job_on(db, token, _default(db, token) if id is None else id)
        if job is None:
            return False
        mark = _mark(db, job)
    if not _end(job.pid, mark):
        raise AcceleratorError(f"Process {job.pid} did not end, even when killed. Try again later.")
    with state.transaction(environ) as db:
        db.execute("UPDATE jobs SET exit = ? WHERE id = ?", (jobs.RESET, job.id))
    return True


def token(environ: Mapping[str, str] = os.environ) -> str:
    """The caller's token: MOREH_SDA_TOKEN, else the local user's own, made on first use."""
    with state.transaction(environ) as db:
        return tokens.current(db, environ)


def configured(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has chosen an accelerator: in the environment, or once for all programs. Makes no files."""
    if any(environ.get(name) for name in ("MOAI_FLAVOR", "MOAI_DEVICES", *_VISIBLE)):
        return True
    try:
        with state.reading(environ) as db:
            row = db and db.execute("SELECT 1 FROM accelerators WHERE flavor IS NOT NULL").fetchone()
    except StateError:  # an unreadable choice is no choice: `import torch` must not fail over it
        return False
    return row is not None


def choose(environ: Mapping[str, str] = os.environ, machine: Machine | None = None) -> Choice:
    """What this program gets: one of its own by MOAI_FLAVOR or MOAI_DEVICES, the one that MOREH_VISIBLE_DEVICE names,
    or the default one. Makes no files.

    Raises ValueError for an unknown flavor or a MOAI_DEVICES that is not a positive number, RuntimeError (which
    AcceleratorError is) where there are not as many devices, and for an unknown accelerator or token.
    """
    machine = machine or pool.probe(environ)
    offered = flavors.available(machine, environ)
    name, count = environ.get("MOAI_FLAVOR"), environ.get("MOAI_DEVICES")
    if name and count:
        raise ValueError(f"MOAI_FLAVOR={name} and MOAI_DEVICES={count} are both set. Unset one of them.")
    if count and not (count.isascii() and count.isdigit() and int(count) > 0):
        raise ValueError(f"MOAI_DEVICES={count}: a number of devices is expected, 1 or more.")
    if count:
        choice = Choice(None, flavors.of_count(int(count), offered, machine))
    else:
        id, stored = (None, name) if name else _stored(environ)
        said_by = f"MOAI_FLAVOR={name}" if name else f"The flavor of accelerator {id}, {stored},"
        flavor = flavors.find(name, offered) if name else _resolved(stored, offered, machine)
        if flavor is None:
            raise ValueError(
                f"{said_by}: no such flavor here. There are: {', '.join(f.name for f in offered)}."
                " Choose one with moreh-switch-model, or with MOAI_FLAVOR=NAME."
            )
        choice = Choice(id, flavor)
    pool.check(choice.flavor.devices, machine)
    return choice


_VISIBLE = ("MOREH_VISIBLE_DEVICE", "MOREH_VISIBLE_DEVICES")


def _visible(environ: Mapping[str, str]) -> int | None:
    for name in _VISIBLE:
        text = environ.get(name)
        if text:
            if not (text.isascii() and text.isdigit()):
                raise AcceleratorError(f"{name}={text}: the id of one accelerator is expected; moreh-smi lists them.")
            return int(text)
    return None


def _stored(environ: Mapping[str, str]) -> tuple[int, str | None]:
    """(id, flavor's name) of the accelerator that this program gets; no name where none was chosen."""
    id = _visible(environ)
    try:
        with state.reading(environ) as db:
            token = tokens.find(db, environ) if db is not None else None
            rows = dict(_rows(db, token)) if db is not None and token else {tokens.FIRST_ACCELERATOR: None}
            default = _default(db, token) if db is not None and token else tokens.FIRST_ACCELERATOR
    except StateError:
        if id is not None or environ.get("MOREH_SDA_TOKEN"):
            raise
        # Training goes on without the state; starting the job will say so.
        return tokens.FIRST_ACCELERATOR, None
    id = default if id is None else id
    if id not in rows:
        raise _unknown(id, rows)
    return id, rows[id]


def _rows(db: sqlite3.Connection, token: str) -> list[tuple[int, str | None]]:
    """(id, flavor's name) of the token's accelerators, by id."""
    return db.execute("SELECT id, flavor FROM accelerators WHERE token = ? ORDER BY id", (token,)).fetchall()


def _default(db: sqlite3.Connection, token: str) -> int:
    (id,) = db.execute("SELECT default_accelerator FROM tokens WHERE token = ?", (token,)).fetchone()
    return int(id)


def _set_default(db: sqlite3.Connection, token: str, id: int) -> None:
    db.execute("UPDATE tokens SET default_accelerator = ? WHERE token = ?", (id, token))


def _require_idle(db: sqlite3.Connection, token: str, id: int, done: str, environ: Mapping[str, str]) -> None:
    """AcceleratorError unless there is the accelerator, and nothing uses it; `done` is what was to be done to it."""
    jobs.settle(db, environ)
    job = _job_on(db, token, id)
    if job is not None and job.accelerator is None:
        raise AcceleratorError(f"Accelerator {id} belongs to process {job.pid} ({job.command}) and goes with it.")
    ids = dict(_rows(db, token))
    if id not in ids:
        raise _unknown(id, ids)
    if job is not None:
        raise AcceleratorError(
            f"Accelerator {id} is in use by process {job.pid} ({job.command}) and cannot be {done} until that ends."
        )


def _unknown(id: int, ids: Iterable[int]) -> AcceleratorError:
    return AcceleratorError(f"There is no accelerator {id}. There are: {', '.join(map(str, ids))}.")


def _job_on(db: sqlite3.Connection, token: str, id: int) -> Job | None:
    """The job on accelerator `id`, whether it is the token's or a program's own."""
    for job in jobs.running(db, token):
        if id == (OWN_IDS + job.id if job.accelerator is None else job.accelerator):
            return job
    return None


def _mark(db: sqlite3.Connection, job: Job) -> str:
    (mark,) = db.execute("SELECT birth FROM jobs WHERE id = ?", (job.id,)).fetchone()
    return str(mark)


def _end(pid: int, mark: str) -> bool:
    """Ask the process to end, then make it; whether it is gone."""
    for order, seconds in ((signal.SIGTERM, TERM_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
        deadline = time.monotonic() + seconds
        try:
            if processes.condition(pid, mark) != "gone":
                os.kill(pid, order)
        except ProcessLookupError:
            return True
        except PermissionError as error:
            raise AcceleratorError(f"Process {pid} belongs to another user and cannot be ended by you.") from error
        while time.monotonic() < deadline:
            if processes.condition(pid, mark) == "gone":
                return True
            time.sleep(0.02)
    return False


def _resolved(stored: str | None, offered: Sequence[Flavor], machine: Machine) -> Flavor | None:
    """The flavor that was stored by its name, None if it is no longer on offer; the default one if none was.

    The size alone will do: the machine's memory, which the name has in it, may have changed since.
    """
    if stored is None:
        return flavors.default(offered, machine)
    return flavors.find(stored, offered) or flavors.find(flavors.size_of(stored), offered)


def _without_devices(name: str | None) -> Flavor:
    """What is shown of a flavor that is no longer on offer."""
    assert name is not None
    return Flavor(flavors.size_of(name), (), name)


def _flavor_of(job: Job) -> Flavor:
    return Flavor(flavors.size_of(job.flavor), job.devices, job.flavor)


def _running(job: Job | None, environ: Mapping[str, str]) -> RunningJob | None:
    if job is None:
        return None
    return RunningJob(job.id, job.pid, job.command, job.plan, job.started, telemetry.usage(job.id, environ))
