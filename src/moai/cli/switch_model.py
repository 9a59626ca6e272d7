"""`moreh-switch-model`: the flavor of the accelerator, chosen from a list or named on the command line."""

from __future__ import annotations

import argparse
import json
import os
import sys

from moai.cli import as_json
from moai.cli.arguments import Parser
from moai.cli.command import run
from moai.cli.menu import ask, flavor_list, pick_flavor
from moai.cli.snapshot import selected
from moai.platform import accelerators, flavors, log
from moai.platform.accelerators import Accelerator, AcceleratorError
from moai.platform.flavors import Flavor


def main(arguments: list[str] | None = None) -> int:
    """Entry point; `arguments` without the command's name, sys.argv's by default. Returns the exit status."""
    return run(lambda: _switch_model(_parse(arguments)))


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="moreh-switch-model",
        description="Show and change the flavor (the size) of the accelerator. Without an argument it asks.",
        epilog="It is the default accelerator that changes, or that of MOREH_VISIBLE_DEVICE, for the next program.",
    )
    parser.add_argument("-h", "--help", action="help", help="show this text")
    parser.add_argument("flavor", nargs="?", metavar="NAME|NUMBER", help="switch to this flavor and leave")
    parser.add_argument("--list", action="store_true", help="list the flavors and leave; * marks the current one")
    parser.add_argument("--json", action="store_true", help="with --list: print JSON")
    options = parser.parse_args(arguments)
    if options.list and options.flavor is not None:
        parser.error(f'--list only shows the flavors: leave it out to switch to "{options.flavor}"')
    if options.json and not options.list:
        parser.error("--json goes with --list")
    return options


def _switch_model(options: argparse.Namespace) -> int:
    offered = flavors.available()
    if options.list:
        _list(offered, options.json)
    elif options.flavor is not None:
        _switch_to(pick_flavor(options.flavor, offered))
    else:
        return _interact(offered)
    return 0


def _list(offered: tuple[Flavor, ...], in_json: bool) -> None:
    current = _current()
    if in_json:
        print(json.dumps({"current": current, "flavors": as_json.flavors(offered)}, indent=2))
    else:
        print(flavor_list(offered, current))


def _interact(offered: tuple[Flavor, ...]) -> int:
    print(f"Current {log.display_name()}: {_current()}\n")
    print(flavor_list(offered, _current()), end="\n\n")

    def act(number: int) -> None:
        _switch_to(offered[number - 1])
        print(f"\n{flavor_list(offered, _current())}\n")

    return ask(lambda: range(1, len(offered) + 1), act)


def _switch_to(flavor: Flavor) -> None:
    name = log.display_name()
    try:
        accelerators.set_flavor(flavor, os.environ)
    except AcceleratorError as error:
        if _selected().job is None:
            raise
        raise AcceleratorError(f"The model cannot be switched while the {name} is in use.") from error
    print(f'The {name} model is successfully switched to  "{flavor.name}".')


def _current() -> str:
    """The name of the flavor that the accelerator has now."""
    return _selected().flavor.name


def _selected() -> Accelerator:
    return selected(accelerators.accelerators(os.environ), os.environ)


if __name__ == "__main__":
    sys.exit(main())
