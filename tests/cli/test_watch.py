"""`--watch`."""

import io
import time

import pytest

from moai.cli.watch import CLEAR_BELOW, CLEAR_LINE, CLEAR_SCREEN, TOP_LEFT, watch


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def watched(monkeypatch):
    """What `watch` writes to an output while it paints pictures once a second, until Ctrl-C after the last one."""

    def run(output, *pictures):
        left = list(pictures)

        def sleep(seconds):
            assert seconds == 1.0
            if not left:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(time, "sleep", sleep)
            patch.setattr("sys.stdout", output)
            assert watch(1.0, lambda: left.pop(0)) == 0
        return output.getvalue()

    return run


def test_into_a_file_one_picture_follows_the_other(watched):
    assert watched(io.StringIO(), "one", "two") == "one\ntwo\n"


def test_on_a_terminal_each_picture_is_painted_over_the_last(watched):
    first = f"{TOP_LEFT}{CLEAR_LINE}a\n{CLEAR_LINE}b\n{CLEAR_BELOW}"
    second = f"{TOP_LEFT}{CLEAR_LINE}c\n{CLEAR_BELOW}"
    assert watched(Terminal(), "a\nb", "c") == CLEAR_SCREEN + first + second + "\n"


def test_a_picture_larger_than_the_window_is_cut_to_it(watched, monkeypatch):
    monkeypatch.setenv("COLUMNS", "3")
    monkeypatch.setenv("LINES", "3")
    written = watched(Terminal(), "abcdef\nb\nc\nd")
    assert written == f"{CLEAR_SCREEN}{TOP_LEFT}{CLEAR_LINE}abc\n{CLEAR_LINE}b\n{CLEAR_BELOW}\n"
