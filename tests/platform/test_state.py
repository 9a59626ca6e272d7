"""The shared database."""

import os
import sqlite3
import stat
import subprocess
import sys

import pytest

from moai.platform import state
from moai.platform.errors import StateError


def count(environ):
    with state.transaction(environ) as db:
        return db.execute("SELECT count(*) FROM tokens").fetchone()[0]


def insert(db):
    db.execute("INSERT INTO tokens VALUES ('t', '', 0, 0, 1)")


def test_a_block_that_ends_is_kept(environ):
    with state.transaction(environ) as db:
        insert(db)
    assert count(environ) == 1


def test_a_block_that_raises_is_undone(environ):
    with pytest.raises(KeyError), state.transaction(environ) as db:
        insert(db)
        raise KeyError
    assert count(environ) == 0


def test_a_process_that_is_killed_in_a_block_leaves_nothing_locked_and_nothing_done(environ):
    code = (
        "import os; from moai.platform import state\n"
        "with state.transaction() as db:\n"
        "    db.execute(\"INSERT INTO tokens VALUES ('t', '', 0, 0, 1)\"); os.kill(os.getpid(), 9)"
    )
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, **environ}, timeout=60).returncode == -9
    assert count(environ) == 0


def test_the_state_is_the_users_only(environ):
    count(environ)
    assert stat.S_IMODE(state.folder(environ).stat().st_mode) & 0o077 == 0


def test_a_database_that_was_moved_away_does_not_come_back_by_its_log(environ):
    count(environ)
    file = state.database(environ)
    keeper = sqlite3.connect(file)  # keeps the log from being merged
    keeper.execute("SELECT * FROM tokens").fetchall()
    with state.transaction(environ) as db:
        insert(db)
    file.rename(file.with_suffix(".damaged"))
    assert count(environ) == 0
    keeper.close()


def test_a_database_of_another_version_is_left_alone(environ):
    count(environ)
    with sqlite3.connect(state.database(environ)) as db:
        db.execute("PRAGMA user_version = 99")
    with pytest.raises(StateError, match="another version of MoAI"):
        count(environ)


def test_a_database_that_is_damaged_inside_is_said(environ):
    count(environ)
    file = state.database(environ)
    content = bytearray(file.read_bytes())
    content[4096:] = b"\xff" * (len(content) - 4096)
    file.write_bytes(content)
    with pytest.raises(StateError, match="is damaged") as error:
        count(environ)
    assert "\n" not in str(error.value)
    assert file.read_bytes() == content


def test_reading_makes_no_files(environ, tmp_path):
    with state.reading(environ) as db:
        assert db is None
    assert list(tmp_path.iterdir()) == []


def test_readers_do_not_wait_for_writers(environ):
    count(environ)
    with state.transaction(environ) as db, state.reading(environ) as reader:
        insert(db)
        assert reader.execute("SELECT count(*) FROM tokens").fetchone() == (0,)
