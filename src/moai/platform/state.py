"""The user's state folder and the small database in it, shared by all of the user's programs.

In: XDG_STATE_HOME or HOME. Out: a SQLite connection with the tables of `SCHEMA`.

Every use opens, commits and closes: a program that crashes leaves nothing locked.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

BUSY_SECONDS = 5.0  # how long to wait while another program writes

SCHEMA = """
CREATE TABLE IF NOT EXISTS settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS jobs (
    id      INTEGER PRIMARY KEY AUTOINCREMENT,
    command TEXT NOT NULL,
    pid     INTEGER NOT NULL,
    flavor  TEXT NOT NULL,
    started REAL NOT NULL,  -- seconds since the epoch
    ended   REAL
);
"""


def database(environ: Mapping[str, str] = os.environ) -> Path:
    """Where the state lies: $XDG_STATE_HOME/moai, or else ~/.local/state/moai."""
    base = environ.get("XDG_STATE_HOME")
    home = environ.get("HOME")
    folder = Path(base) if base else (Path(home) if home else Path.home()) / ".local" / "state"
    return folder / "moai" / "state.sqlite3"


@contextmanager
def connect(environ: Mapping[str, str] = os.environ) -> Iterator[sqlite3.Connection]:
    """One transaction, committed at the end of the block.

    Raises OSError or sqlite3.Error where the folder cannot be made or written.
    """
    path = database(environ)
    path.parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(path, timeout=BUSY_SECONDS)) as connection:
        connection.executescript(SCHEMA)
        with connection:
            yield connection


def setting(name: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """The value saved under `name`, or None. Creates nothing: a machine without state stays without."""
    path = database(environ)
    if not path.exists():
        return None
    with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=BUSY_SECONDS)) as connection:
        row = connection.execute("SELECT value FROM settings WHERE name = ?", (name,)).fetchone()
    return row[0] if row else None


def save_setting(name: str, value: str, environ: Mapping[str, str] = os.environ) -> None:
    """Save `value` under `name` for all of the user's later programs."""
    with connect(environ) as connection:
        connection.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, value))
