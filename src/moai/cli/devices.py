"""`moreh-smi device ...`: add, remove and switch accelerators.

In: a number from the command line, or from a prompt where it is missing. Out: the accelerators after each change, and
the line that says it is done.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence

from moai.cli import as_json, screens
from moai.cli.command import FAILED, complain
from moai.cli.menu import ask, flavor_list, pick_flavor
from moai.platform import accelerators, flavors, log
from moai.platform.accelerators import Accelerator, AcceleratorError

ADDED = "Create device success."
REMOVED = "Remove device success."
SWITCHED = "Switch Current Device success."


def add(flavor: str, in_json: bool = False) -> int:
    """Make an accelerator of the flavor with this number or name. Returns the exit status, as do the following."""
    accelerators.add(pick_flavor(flavor, flavors.available()), os.environ)
    _show(ADDED, in_json)
    return 0


def remove(accelerator_id: int, in_json: bool = False) -> int:
    accelerators.remove(accelerator_id, os.environ)
    _show(REMOVED, in_json)
    return 0


def switch(accelerator_id: int, in_json: bool = False) -> int:
    accelerators.switch(accelerator_id, os.environ)
    _show(SWITCHED, in_json)
    return 0


def remove_all(in_json: bool = False) -> int:
    """Remove every accelerator but the default one; says of those that are in use why they stay."""
    exit_status = 0
    for accelerator_id in [a.id for a in _kept() if not a.is_default]:
        try:
            accelerators.remove(accelerator_id, os.environ)
        except AcceleratorError as error:
            complain(str(error))
            exit_status = FAILED
    _show(REMOVED if exit_status == 0 else "", in_json)
    return exit_status


def ask_add() -> int:
    """Ask for flavors and add an accelerator of each."""
    offered = flavors.available()
    print(flavor_list(offered), end="\n\n")

    def act(number: int) -> None:
        accelerators.add(offered[number - 1], os.environ)
        _show(ADDED)
        print(f"\n{flavor_list(offered)}\n")

    return ask(lambda: range(1, len(offered) + 1), act)


def ask_remove() -> int:
    return _ask_for_ids(remove)


def ask_switch() -> int:
    return _ask_for_ids(switch)


def _ask_for_ids(change: Callable[[int], object]) -> int:
    _show()

    def act(accelerator_id: int) -> None:
        change(accelerator_id)
        print()

    print()
    return ask(_ids, act)


def _ids() -> Sequence[int]:
    return [a.id for a in _kept()]


def _kept() -> Sequence[Accelerator]:
    """Without those that come and go with a program."""
    return [a for a in accelerators.accelerators(os.environ) if a.id < accelerators.OWN_IDS]


def _show(message: str = "", in_json: bool = False) -> None:
    left = accelerators.accelerators(os.environ)
    if in_json:
        print(json.dumps({"message": message, "accelerators": as_json.models(left)}, indent=2))
        return
    print(screens.models(left, log.display_name()))
    if message:
        print(message)
