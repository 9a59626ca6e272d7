"""The user's state folder, and the database in it that all of the user's programs share.

In: XDG_STATE_HOME or HOME. Out: transactions on a SQLite database with the tables of `SCHEMA`.

Every use opens, commits and closes within milliseconds. A program that is killed, even in the middle of a transaction,
leaves nothing locked and nothing half done: SQLite's write-ahead log sees to that.
"""

from __future__ import annotations

import fcntl
import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from moai.platform.errors import StateError

BUSY_SECONDS = 10.0  # how long to wait while other programs write
VERSION = 1  # of the schema
JOBS = "jobs"  # the folder, beside the database, of small files that are written without a transaction

SCHEMA = f"""
CREATE TABLE tokens (
    token               TEXT PRIMARY KEY,
    description         TEXT NOT NULL,
    is_local            INTEGER NOT NULL,  -- the one that programs use which name none
    default_accelerator INTEGER NOT NULL,
    next_accelerator    INTEGER NOT NULL   -- ids are never given twice
);
CREATE TABLE accelerators (
    token  TEXT NOT NULL REFERENCES tokens,
    id     INTEGER NOT NULL,
    flavor TEXT,  -- null: the machine's default, until the user chooses
    PRIMARY KEY (token, id)
);
CREATE TABLE jobs (
    id           INTEGER PRIMARY KEY AUTOINCREMENT,
    token        TEXT NOT NULL,
    accelerator  INTEGER,        -- null: one of its own, which comes and goes with the program
    command      TEXT NOT NULL,
    pid          INTEGER NOT NULL,
    birth        TEXT NOT NULL,  -- tells the process from a later one with the same pid
    flavor       TEXT NOT NULL,
    devices      TEXT NOT NULL,  -- JSON
    names        TEXT NOT NULL,  -- of the devices in the pool, separated by spaces
    plan         TEXT NOT NULL,
    started      REAL NOT NULL,  -- seconds since the epoch
    ended        REAL,           -- when the devices were released
    exit         TEXT,           -- status or reason, known once the process is gone
    tokens_per_s REAL,
    peak_bytes   INTEGER
);
CREATE INDEX unfinished_jobs ON jobs (id) WHERE ended IS NULL OR exit IS NULL;
CREATE TABLE requests (  -- of programs that wait for devices
    id          INTEGER PRIMARY KEY AUTOINCREMENT,
    token       TEXT NOT NULL,
    accelerator INTEGER,
    pid         INTEGER NOT NULL,
    birth       TEXT NOT NULL,
    priority    INTEGER NOT NULL
);
PRAGMA user_version = {VERSION};
"""


def folder(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the state lies: $XDG_STATE_HOME/moai, or else ~/.local/state/moai."""
    base = environ.get("XDG_STATE_HOME")
    home = environ.get("HOME")
    return (Path(base) if base else (Path(home) if home else Path.home()) / ".local" / "state") / "moai"


def database(environ: Mapping[str, str] = os.environ) -> Path:
    """The database's file."""
    return folder(environ) / "platform.sqlite3"


def job_file(job_id: int, ending: str, environ: Mapping[str, str] = os.environ) -> Path:
    """A file of a job's, outside of the database."""
    return folder(environ) / JOBS / f"{job_id}{ending}"


@contextmanager
def transaction(environ: Mapping[str, str] = os.environ) -> Iterator[sqlite3.Connection]:
    """One write transaction: commits at the end of the block, is rolled back by an exception.

    Raises StateError where the database cannot be made, read or written.
    """
    path = database(environ)
    try:
        _create(path)
        with closing(_open(path)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            connection.execute("COMMIT")
    except sqlite3.Error as error:
        raise _explained(error, path) from error


@contextmanager
def reading(environ: Mapping[str, str] = os.environ) -> Iterator[sqlite3.Connection | None]:
    """One moment's state, for reading only; None, and nothing is made, where there is no state yet.

    Raises StateError where the database cannot be read.
    """
    path = database(environ)
    if not path.exists():
        yield None
        return
    try:
        with closing(_open(path)) as connection:
            connection.execute("BEGIN")
            yield connection
    except sqlite3.Error as error:
        raise _explained(error, path) from error


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=BUSY_SECONDS)
    connection.isolation_level = None  # transactions are ours to begin
    try:
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != VERSION:
            raise StateError(
                f"{path} was written by another version of MoAI (schema {version}; this one has {VERSION})."
                " Use that version, or set XDG_STATE_HOME to another folder."
            )
        # The log is enough to survive a crash of programs; a power cut may cost the last second, not the file.
        connection.execute("PRAGMA synchronous = NORMAL")
    except BaseException:
        connection.close()
        raise
    return connection


def _create(path: Path) -> None:
    """Makes the database, if there is none, in one step: no program ever sees a part of it."""
    if path.exists():
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        (path.parent / JOBS).mkdir(exist_ok=True)
        with open(path.with_suffix(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if path.exists():
                return
            draft = path.with_suffix(".draft")
            # A log that is left of a database which was moved away would be taken for the new one's.
            for left in (draft, *(path.with_name(path.name + end) for end in ("-wal", "-shm", "-journal"))):
                left.unlink(missing_ok=True)
            with closing(sqlite3.connect(draft)) as connection:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(SCHEMA)
            draft.rename(path)
    except OSError as error:
        raise _unwritable(path, error) from error


def _explained(error: sqlite3.Error, path: Path) -> StateError:
    text = str(error)
    if "locked" in text or "busy" in text:
        return StateError(
            f"{path} has been locked by another program for {BUSY_SECONDS:.0f} s. Try again later;"
            f" `fuser -v {path}` names the program."
        )
    if isinstance(error, sqlite3.OperationalError) or not isinstance(error, sqlite3.DatabaseError):
        return _unwritable(path, error)
    return StateError(
        f"{path} is damaged ({text}). Nothing was changed; `mv {path.parent} {path.parent}.damaged` sets it aside, and"
        " the platform starts afresh."
    )


def _unwritable(path: Path, error: Exception) -> StateError:
    return StateError(
        f"The state folder {path.parent} cannot be written ({error}). Make it writable, or set XDG_STATE_HOME to a"
        " folder that is."
    )
