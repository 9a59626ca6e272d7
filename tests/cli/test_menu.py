"""Numbered choices."""

import io

import pytest

from moai.cli.menu import LONGEST_NUMBER, ask, flavor_list, pick_flavor
from moai.platform.errors import AcceleratorError
from tests.cli.conftest import flavor

OFFERED = [flavor("Small.64GB"), flavor("Large.256GB"), flavor("1.5xLarge.768GB")]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def chosen(monkeypatch, typed, numbers=(1, 2, 3)):
    """(exit status, what was acted on) for what is typed or piped in."""
    monkeypatch.setattr("sys.stdin", typed)
    acted = []
    return ask(lambda: numbers, acted.append), acted


def test_the_current_flavor_is_marked_two_spaces_behind_its_name():
    assert flavor_list(OFFERED, "Large.256GB") == "1. Small.64GB\n2. Large.256GB  *\n3. 1.5xLarge.768GB"


@pytest.mark.parametrize("text", ["2", " 2 ", "Large.256GB", "large.256gb", "large", "LARGE"])
def test_a_flavor_is_named_by_number_or_by_name(text):
    assert pick_flavor(text, OFFERED) is OFFERED[1]


@pytest.mark.parametrize("text", ["0", "4", "-1", "1.5", "huge", "", "9" * 5000, "²"])
def test_an_unknown_flavor_is_refused_with_the_choices(text):
    with pytest.raises(AcceleratorError, match=r"1 to 3.*Small\.64GB, Large\.256GB"):
        pick_flavor(text, OFFERED)


@pytest.mark.parametrize("end", ["q\n", "Q\n", "q", " q \n", ""])
def test_q_and_the_end_of_the_input_leave(monkeypatch, end):
    assert chosen(monkeypatch, io.StringIO("1\n3\n" + end)) == (0, [1, 3])


def test_nothing_is_read_after_q(monkeypatch):
    assert chosen(monkeypatch, io.StringIO("q\n1\n")) == (0, [])


def test_without_any_stdin_it_leaves(monkeypatch):
    assert chosen(monkeypatch, None) == (0, [])


@pytest.mark.parametrize("wrong", ["0", "4", "99", "x", "", "1 2", "-1", "1.0", "9" * (LONGEST_NUMBER + 1), "9" * 5000])
def test_a_wrong_selection_is_refused_and_asked_for_again(monkeypatch, capsys, wrong):
    assert chosen(monkeypatch, io.StringIO(f"{wrong}\n2\nq\n")) == (1, [2])
    out, err = capsys.readouterr()
    assert err.count("\n") == 1
    assert "1 to 3" in err
    assert out.count("Selection (1-3, q, Q): ") == 3


def test_numbers_with_gaps_are_listed_one_by_one(monkeypatch, capsys):
    assert chosen(monkeypatch, io.StringIO("1\nq\n"), numbers=(0, 2, 5)) == (1, [])
    out, err = capsys.readouterr()
    assert out.startswith("Selection (0-5, q, Q): ")
    assert "(0, 2, 5)" in err


def test_a_refused_action_is_one_line_and_the_next_prompt(monkeypatch, capsys):
    def refuse(number):
        raise AcceleratorError("busy")

    monkeypatch.setattr("sys.stdin", io.StringIO("1\nq\n"))
    assert ask(lambda: (1, 2), refuse) == 1
    out, err = capsys.readouterr()
    assert err.endswith(": busy\n")
    assert out == "Selection (1-2, q, Q): 1\nSelection (1-2, q, Q): q\n"


def test_what_is_typed_on_a_terminal_is_not_printed_again(monkeypatch, capsys):
    chosen(monkeypatch, Terminal("1\nq\n"))
    assert capsys.readouterr().out == "Selection (1-3, q, Q): Selection (1-3, q, Q): "
