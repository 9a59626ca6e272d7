"""Argument parsing that the `moreh-*` commands share."""

from __future__ import annotations

import argparse
import math
from typing import Any, NoReturn

from moai.cli.command import complain

USAGE_ERROR = 2
LONGEST_WAIT = 86_400.0  # seconds


class Parser(argparse.ArgumentParser):
    """Answers a mistake with one line instead of the whole usage, and takes no abbreviations."""

    def __init__(self, prog: str, description: str, epilog: str, usage: str | None = None) -> None:
        super().__init__(
            prog=prog,
            usage=usage,
            description=description,
            epilog=epilog,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            add_help=False,
        )

    def print_help(self, file: Any = None) -> None:
        """argparse's own passes over a closed pipe in silence."""
        print(self.format_help(), end="", file=file)

    def error(self, message: str) -> NoReturn:
        complain(f"{message}. See {self.prog} --help.")
        self.exit(USAGE_ERROR)


def accelerator_id(text: str) -> int:
    """For argparse: the id of an accelerator, 0 or more."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise argparse.ArgumentTypeError(f'"{text}" is not the number of a device')
    return int(text)


def seconds(text: str) -> float:
    """For argparse: a positive time of up to a day."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= LONGEST_WAIT:  # also refuses nan
        raise argparse.ArgumentTypeError(f'"{text}" is not a number of seconds above 0, of one day at most')
    return value
