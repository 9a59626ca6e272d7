"""Tokens: whose accelerators they are.

In: a transaction, MOREH_SDA_TOKEN. Out: the caller's token; the local user's own is made on first use, with a first
accelerator.
"""

from __future__ import annotations

import base64
import os
import secrets
import sqlite3
from collections.abc import Mapping

from moai.platform import state
from moai.platform.errors import AcceleratorError

FIRST_ACCELERATOR = 0


def current(db: sqlite3.Connection, environ: Mapping[str, str]) -> str:
    """The caller's token. AcceleratorError if MOREH_SDA_TOKEN names one that does not exist."""
    return find(db, environ) or _add(db, "the local user's own", is_local=True)


def find(db: sqlite3.Connection, environ: Mapping[str, str]) -> str | None:
    """The same; None where the local user has none yet."""
    named = environ.get("MOREH_SDA_TOKEN")
    if not named:
        row = db.execute("SELECT token FROM tokens WHERE is_local").fetchone()
    elif (row := db.execute("SELECT token FROM tokens WHERE token = ?", (named,)).fetchone()) is None:
        raise AcceleratorError(f"There is no token {named}. Correct MOREH_SDA_TOKEN, or unset it to use your own.")
    return row[0] if row else None


def create(description: str, environ: Mapping[str, str] = os.environ) -> str:
    """A new token, for MOREH_SDA_TOKEN; it comes with one accelerator. Raises StateError."""
    with state.transaction(environ) as db:
        return _add(db, description, is_local=False)


def _add(db: sqlite3.Connection, description: str, is_local: bool) -> str:
    token = base64.b64encode(secrets.token_bytes(18)).decode()  # 24 characters
    first = FIRST_ACCELERATOR
    db.execute("INSERT INTO tokens VALUES (?, ?, ?, ?, ?)", (token, description, is_local, first, first + 1))
    db.execute("INSERT INTO accelerators VALUES (?, ?, NULL)", (token, first))
    return token
