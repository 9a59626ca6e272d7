"""Long waits explain themselves, short ones do not."""

import io
import sys
import time

import pytest

from moai.platform import log
from moai.platform.progress import Waiting


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def stderr(monkeypatch, fresh_logger):
    """A function that puts a file in stderr's place."""

    def replace(file):
        monkeypatch.setattr(sys, "stderr", file)
        log.install()
        return file

    return replace


@pytest.mark.parametrize("kind", [io.StringIO, Terminal])
def test_a_short_wait_prints_nothing(stderr, kind):
    file = stderr(kind())
    with Waiting("Compiling", quiet_seconds=0.2):
        pass
    time.sleep(0.3)
    assert file.getvalue() == ""


def test_a_long_wait_is_one_line_in_a_file(stderr):
    file = stderr(io.StringIO())
    with Waiting("Loading weights", total=4, quiet_seconds=0.1) as wait:
        wait.advance()
        time.sleep(0.4)
        wait.advance(3)
    (line,) = file.getvalue().splitlines()
    assert "Loading weights" in line
    assert "1 of 4 done" in line


def test_a_long_wait_is_shown_with_its_time_on_a_terminal(stderr, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    file = stderr(Terminal())
    with Waiting("Compiling", total=4, quiet_seconds=0.1) as wait:
        wait.advance(2)
        time.sleep(0.5)
    assert "Compiling" in file.getvalue()
    assert "2/4" in file.getvalue()
    assert "0:00:00" in file.getvalue()


def test_an_error_inside_ends_the_wait(stderr):
    file = stderr(io.StringIO())
    with pytest.raises(KeyError), Waiting("Compiling", quiet_seconds=0.2):
        raise KeyError
    time.sleep(0.3)
    assert file.getvalue() == ""
