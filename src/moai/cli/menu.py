"""Numbered choices: the list of flavors, and the prompt that asks for a number until it is told to stop.

In: lines of stdin, from a person or from a pipe. Out: the same transcript in both cases.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from moai.cli.command import FAILED, complain
from moai.platform.accelerators import AcceleratorError
from moai.platform.flavors import Flavor

LONGEST_NUMBER = 9  # digits; longer ones are no choice of ours


def flavor_list(flavors: Sequence[Flavor], current: str | None = None) -> str:
    """`1. Small.64GB` and so on; the one called `current` is marked."""
    return "\n".join(f"{i}. {f.name}{'  *' if f.name == current else ''}" for i, f in enumerate(flavors, 1))


def pick_flavor(text: str, flavors: Sequence[Flavor]) -> Flavor:
    """The flavor with the number or the name `text`; case does not matter, and the memory may be left out ("large").

    Raises AcceleratorError where there is none.
    """
    number = as_number(text)
    for i, flavor in enumerate(flavors, 1):
        if number == i or text.strip().lower() in (flavor.name.lower(), flavor.size.lower()):
            return flavor
    raise AcceleratorError(
        f'There is no flavor "{text}". Choose a number from 1 to {len(flavors)} or a name:'
        f" {', '.join(f.name for f in flavors)}."
    )


def as_number(text: str) -> int | None:
    """The number that `text` is, or None."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdigit() and len(text) <= LONGEST_NUMBER else None


def ask(numbers: Callable[[], Sequence[int]], act: Callable[[int], None]) -> int:
    """Prompt and `act` on each number, until q, Q or the end of stdin. Returns the exit status.

    `numbers` says before each prompt what can be chosen. A selection that is none of them, or that `act` refuses with
    an AcceleratorError, is answered with one line on stderr and the next prompt; the exit status is 1 then.
    """
    exit_status = 0
    while True:
        choices = numbers()
        answer = _read(f"Selection ({min(choices)}-{max(choices)}, q, Q): ")
        if answer is None or answer in ("q", "Q"):
            return exit_status
        number = as_number(answer)
        try:
            if number is None or number not in choices:
                raise AcceleratorError(
                    f'"{answer}" cannot be selected. A number is expected ({_listed(choices)}), or q to leave.'
                )
            act(number)
        except AcceleratorError as error:
            complain(str(error))
            exit_status = FAILED


def _read(prompt: str) -> str | None:
    """One line of stdin, None at its end. A line from a pipe is shown as if it were typed."""
    sys.stdout.write(prompt)
    sys.stdout.flush()
    line = sys.stdin.readline() if sys.stdin else ""
    if not line:
        print()
        return None
    line = line.strip()
    if not sys.stdin.isatty():
        print(line)
    return line


def _listed(numbers: Sequence[int]) -> str:
    """`1 to 13`, or `0, 2, 3` where some are missing."""
    if len(numbers) > 1 and len(numbers) == max(numbers) - min(numbers) + 1:
        return f"{min(numbers)} to {max(numbers)}"
    return ", ".join(map(str, numbers))
