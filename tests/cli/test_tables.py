"""The boxes of the `moreh-*` commands, to the character."""

import pytest

from moai.cli.tables import Column, clip, display_width, printable, render


def box(*lines):
    return "\n".join(lines)


def test_a_column_is_its_longest_text_and_four_spaces_wide():
    assert render([Column("Id"), Column("Model")], [["0", "Small.64GB"]]) == box(
        "+---------------------+",
        "|  Id  |     Model    |",
        "+=====================+",
        "|  0   |  Small.64GB  |",
        "+---------------------+",
    )


@pytest.mark.parametrize(("longest", "before"), [(5, 2), (6, 3), (7, 3), (8, 4), (14, 7)])
def test_a_header_begins_at_half_the_width_less_half_its_length(longest, before):
    header = render([Column("Model")], [["x" * longest]]).splitlines()[1]
    assert header.index("Model") - 1 == before


def test_right_aligned_cells_keep_two_spaces_behind_them():
    table = render([Column("Job ID", align="right")], [["7"], ["1001"]])
    assert table.splitlines()[3:5] == ["|       7  |", "|    1001  |"]


def test_a_column_can_have_a_least_width():
    assert render([Column("Id", least=10)], [["0"]]).splitlines()[0] == "+----------+"


def test_a_caption_stands_above_the_headers_to_the_right():
    assert render([Column("Device"), Column("Model")], [], caption="v 1") == box(
        "+--------------------+",
        "|               v 1  |",
        "+--------------------+",
        "|  Device  |  Model  |",
        "+====================+",
        "+--------------------+",
    )


def test_a_caption_longer_than_the_table_widens_it():
    lines = render([Column("A")], [["0"]], caption="a long caption").splitlines()
    assert {len(line) for line in lines} == {len("|  a long caption  |")}


def test_characters_of_two_cells_are_counted_as_two():
    lines = render([Column("Process")], [["python 학습.py"], ["python train.py"]]).splitlines()
    assert {display_width(line) for line in lines} == {len("|  python train.py  |")}


def test_a_cell_stays_on_its_line_whatever_it_holds():
    assert printable("python -c 'a\nb\x1b[2J'") == r"python -c 'a\nb\x1b[2J'"
    assert printable("bad \udcff byte") == r"bad \udcff byte"
    assert len(render([Column("Process")], [["one\ntwo"]]).splitlines()) == 5


def test_clipping_counts_cells_not_characters():
    assert clip("abcdef", 4) == "abcd"
    assert clip("학습.py", 5) == "학습."
    assert clip("학습.py", 3) == "학"
    assert clip("학습", 10) == "학습"
