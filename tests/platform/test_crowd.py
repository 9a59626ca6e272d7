"""Many programs change the shared state at once, and some are killed while they do: nothing is lost, nothing breaks."""

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from moai.platform import accelerators, state

ROOT = Path(__file__).parents[2]
DURATIONS = [4, pytest.param(60, marks=pytest.mark.slow)]


def crowd(environ, seconds, *options):
    result = subprocess.run(
        [sys.executable, "-m", "tests.platform.crowd", str(seconds), *options],
        env={**os.environ, **environ},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds + 60,
    )
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def ids(environ):
    return {a.id for a in accelerators.accelerators(environ)}


def check_database(environ):
    database = sqlite3.connect(state.database(environ))
    assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    ((default, following),) = database.execute("SELECT default_accelerator, next_accelerator FROM tokens").fetchall()
    database.close()
    assert default in ids(environ)
    return following


@pytest.mark.parametrize("seconds", DURATIONS)
def test_fifty_programs_at_once_lose_no_update(environ, seconds):
    did = crowd(environ, seconds)
    assert did["error"] == []
    assert did["added"] == list(range(1, 1 + len(did["added"])))
    assert len(set(did["removed"])) == len(did["removed"]) > 0
    assert ids(environ) == {0, *did["added"]} - set(did["removed"])
    assert check_database(environ) == 1 + len(did["added"])


@pytest.mark.parametrize("seconds", DURATIONS)
def test_programs_that_are_killed_at_random_leave_nothing_half_done(environ, seconds):
    did = crowd(environ, seconds, "--kill")
    assert did["error"] == []
    assert did["programs"] > 60
    assert len(set(did["added"])) == len(did["added"])
    assert len(set(did["removed"])) == len(did["removed"]) > 0
    left = ids(environ)
    assert {0, *did["added"]} - set(did["removing"]) <= left
    assert left.isdisjoint(did["removed"])
    assert max(left) < check_database(environ)
