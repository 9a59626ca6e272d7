"""Plans that were chosen before, on disk."""

import os

import pytest

from moai.lower import cache
from moai.plan.plan import Plan
from moai.planning import remembered
from moai.planning.remembered import Remembered

CHOSEN = Remembered(Plan(dp=2, micro=4, recompute="full", distribute_param=True), 78, 66, 0.25, 1 << 30)


@pytest.fixture
def environ(tmp_path):
    return {"XDG_CACHE_HOME": str(tmp_path)}


def test_what_was_kept_is_found_again(environ):
    remembered.keep("a", CHOSEN, environ)
    assert remembered.find("a", environ) == CHOSEN
    assert remembered.find("b", environ) is None


@pytest.mark.parametrize("content", ["", "{", "[]", '{"plan": {"dp": 2}}', '{"plan": {"sizes": 2}}', "\0", "9" * 5000])
def test_a_damaged_file_is_as_good_as_none(environ, tmp_path, content):
    remembered.keep("a", CHOSEN, environ)
    (tmp_path / "moai" / "plans" / "a").write_text(content)
    assert remembered.find("a", environ) is None


def test_nothing_is_kept_where_that_is_switched_off(environ):
    off = {**environ, cache.VARIABLE: "0"}
    remembered.keep("a", CHOSEN, off)
    assert remembered.find("a", environ) is None
    remembered.keep("a", CHOSEN, environ)
    assert remembered.find("a", off) is None


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    (tmp_path / "moai").write_text("a file")
    remembered.keep("a", CHOSEN, {"XDG_CACHE_HOME": str(tmp_path)})
    assert remembered.find("a", {"XDG_CACHE_HOME": str(tmp_path)}) is None


def test_what_was_not_used_for_longest_goes_first(environ, tmp_path, monkeypatch):
    monkeypatch.setattr(remembered, "_MOST_FILES", 2)
    for age, name in enumerate("abc"):
        remembered.keep(name, CHOSEN, environ)
        os.utime(tmp_path / "moai" / "plans" / name, (age, age))
    remembered.keep("d", CHOSEN, environ)
    assert sorted(file.name for file in (tmp_path / "moai" / "plans").iterdir()) == ["c", "d"]
