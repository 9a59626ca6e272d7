"""The boxes of the `moreh-*` commands.

In: columns and rows of text. Out: one string, to the character what the original platform draws: a full-width frame
without joints, columns as wide as their longest text and two spaces on either side.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

MARGIN = 2  # spaces on either side of the longest text


@dataclass(frozen=True, slots=True)
class Column:
    """`least` is the narrowest the column gets, margins included."""

    header: str
    align: Literal["left", "right"] = "left"
    least: int = 0


def render(columns: Sequence[Column], rows: Sequence[Sequence[str]], caption: str = "") -> str:
    """The box, without a newline at its end; `caption` is a right-aligned line above the headers."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [_width(column, [row[i] for row in rows]) for i, column in enumerate(columns)]
    inner = sum(widths) + len(widths) - 1
    if caption:
        short = display_width(caption) + 2 * MARGIN - inner
        if short > 0:  # the caption is the longest line: the last column takes the difference
            widths[-1] += short
            inner += short
    rule = f"+{'-' * inner}+"
    lines = [rule]
    if caption:
        lines += [f"|{_cell(caption, inner, 'right')}|", rule]
    lines.append(_row([_header(column.header, width) for column, width in zip(columns, widths, strict=True)]))
    lines.append(f"+{'=' * inner}+")
    for row in rows:
        cells = zip(row, widths, columns, strict=True)
        lines.append(_row([_cell(text, width, column.align) for text, width, column in cells]))
    lines.append(rule)
    return "\n".join(lines)


def printable(text: str) -> str:
    """`text` on one line: line ends, control characters and undecodable bytes (a command line may hold any) escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def display_width(text: str) -> int:
    """Terminal cells that `text` takes: Korean and Chinese characters take two, combining marks none."""
    if text.isascii():
        return len(text)
    return sum(map(_cells, text))


def clip(text: str, width: int) -> str:
    """As much of the start of `text` as `width` terminal cells hold."""
    if text.isascii():
        return text[:width]
    for end, character in enumerate(text):
        width -= _cells(character)
        if width < 0:
            return text[:end]
    return text


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _width(column: Column, cells: list[str]) -> int:
    longest = max(display_width(text) for text in [column.header, *cells])
    return max(column.least, longest + 2 * MARGIN)


def _header(text: str, width: int) -> str:
    before = width // 2 - len(text) // 2
    return " " * before + text + " " * (width - before - len(text))


def _cell(text: str, width: int, align: Literal["left", "right"]) -> str:
    fill = " " * (width - MARGIN - display_width(text))
    margin = " " * MARGIN
    return f"{margin}{text}{fill}" if align == "left" else f"{fill}{text}{margin}"


def _row(cells: list[str]) -> str:
    return f"|{'|'.join(cells)}|"
