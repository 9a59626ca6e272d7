"""`moreh-smi`: the accelerators, what runs on them, and their management.

In: the command line. Out: a screen on stdout, or the same as JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import sys
from typing import Any

from moai.cli import as_json, devices, screens, snapshot
from moai.cli.arguments import Parser, accelerator_id, seconds
from moai.cli.command import FAILED, run
from moai.cli.menu import flavor_list
from moai.cli.watch import watch
from moai.platform import accelerators, flavors

ASK = object()  # stands for the argument of --add, --rm or --switch where it is missing
RELEASED = "Device release success."
NOTHING_TO_RELEASE = "Device release failed. (Not running job.)"

USAGE = """moreh-smi [-h | --help] [-r | --reset] [-s | --server-version] [-v | --version] [-t | --token]
                 [-i N | --idx N] [-p] [--json] [--watch SECONDS]
       moreh-smi device [--list | --add [MODEL] | --rm [DEVICE | --all] | --switch [DEVICE]] [--json]"""

EPILOG = """If the argument of --add, --rm or --switch is missing, moreh-smi asks for it.

examples:
  moreh-smi                     all devices, and the processes that use them
  moreh-smi -i 2                device 2 only
  moreh-smi --watch 1           the same again every second; Ctrl-C ends it
  moreh-smi device --add 3      add a device of the third model of `moreh-smi device --list`
  moreh-smi device --switch 1   make device 1 the default one
  moreh-smi --json | jq .       for programs"""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; `arguments` without the command's name, sys.argv's by default. Returns the exit status."""
    return run(lambda: _smi(_parse(sys.argv[1:] if arguments is None else arguments)))


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = Parser(
        prog="moreh-smi", usage=USAGE, description="Show and manage your accelerators (devices).", epilog=EPILOG
    )
    _add_basic_options(parser.add_argument_group("basic options"))
    _add_device_options(parser.add_argument_group("device options"))
    options = parser.parse_args(_with_dashes(arguments))
    _check(parser, options)
    return options


def _add_basic_options(group: argparse._ArgumentGroup) -> None:
    group.add_argument("-h", "--help", action="help", help="show this text")
    one = group.add_mutually_exclusive_group()
    one.add_argument("-r", "--reset", action="store_true", help="stop the running process and release the device")
    one.add_argument("-s", "--server-version", action="store_true", help="version of the framework on the server")
    one.add_argument("-v", "--version", action="store_true", help="version of the framework in this environment")
    one.add_argument("-t", "--token", action="store_true", help="the token that the devices belong to")
    one.add_argument("-p", dest="hardware", action="store_true", help="the physical devices behind a device")
    group.add_argument("-i", "--idx", type=accelerator_id, metavar="N", help="device N only")
    group.add_argument("--json", action="store_true", help="print JSON")
    group.add_argument("--watch", type=seconds, metavar="SECONDS", help="repaint every so often, until Ctrl-C")


def _add_device_options(group: argparse._ArgumentGroup) -> None:
    existing: dict[str, Any] = {"nargs": "?", "type": accelerator_id, "const": ASK, "metavar": "DEVICE"}
    group.add_argument("device", nargs="?", choices=["device"], metavar="device", help="goes before these options")
    one = group.add_mutually_exclusive_group()
    one.add_argument("--list", action="store_true", help="models that can be added")
    one.add_argument("--add", nargs="?", const=ASK, metavar="MODEL", help="add a device; MODEL is a number or a name")
    one.add_argument("--rm", **existing, help="remove a device")
    one.add_argument("--switch", **existing, help="make a device the default one")
    group.add_argument("--all", action="store_true", help="with --rm: remove all devices but the default one")


def _with_dashes(arguments: list[str]) -> list[str]:
    """`device add 3` is taken for `device --add 3`, as some pages of the original write it."""
    if arguments[:1] == ["device"] and arguments[1:2] and arguments[1] in ("list", "add", "rm", "switch"):
        return ["device", f"--{arguments[1]}", *arguments[2:]]
    return arguments


def _check(parser: Parser, options: argparse.Namespace) -> None:
    """Combinations that argparse cannot refuse."""
    changes = [options.add, options.rm, options.switch]
    manages = options.list or any(change is not None for change in changes)
    shows_one_thing = options.reset or options.server_version or options.version or options.token or options.hardware
    if options.device and not manages:
        parser.error("device: one of --list, --add, --rm and --switch is expected")
    if manages and (shows_one_thing or options.idx is not None):
        parser.error("--list, --add, --rm and --switch go with no other option than --json")
    if options.all and options.rm is not ASK:
        parser.error("--all goes with --rm only, without a device")
    if options.watch and (manages or options.reset):
        parser.error("--watch goes with what is shown, not with what is changed")
    if options.json and any(change is ASK for change in changes) and not options.all:
        parser.error("--json needs the argument of --add, --rm or --switch: it does not ask")


def _smi(options: argparse.Namespace) -> int:
    if options.add is not None:
        return devices.ask_add() if options.add is ASK else devices.add(options.add, options.json)
    if options.all:
        return devices.remove_all(options.json)
    if options.rm is not None:
        return devices.ask_remove() if options.rm is ASK else devices.remove(options.rm, options.json)
    if options.switch is not None:
        return devices.ask_switch() if options.switch is ASK else devices.switch(options.switch, options.json)
    if options.reset:
        return _reset(options)
    if options.watch:
        return watch(options.watch, lambda: _view(options))
    print(_view(options))
    return 0


def _reset(options: argparse.Namespace) -> int:
    environ = dict(os.environ)
    if options.idx is not None:
        snapshot.take(environ).only(options.idx)  # refuses an unknown one
        environ["MOREH_VISIBLE_DEVICE"] = str(options.idx)
    released = accelerators.reset(environ)
    message = RELEASED if released else NOTHING_TO_RELEASE
    print(json.dumps({"message": message, "released": released}) if options.json else message)
    return 0 if released else FAILED


def _view(options: argparse.Namespace) -> str:
    """The screen, or its JSON: on one line where it is repeated."""
    if options.json:
        return json.dumps(_data(options), indent=None if options.watch else 2)
    return _text(options)


def _text(options: argparse.Namespace) -> str:
    if options.list:
        return flavor_list(flavors.available())
    if options.version:
        return snapshot.current_version()
    if options.server_version:
        return snapshot.server_version(os.environ)
    look = _look(options)
    if options.token:
        return screens.tokens(look)
    if options.hardware:
        return screens.hardware(look.now, look.selected(os.environ), socket.gethostname())
    return screens.status(look)


def _data(options: argparse.Namespace) -> Any:
    if options.list:
        return as_json.flavors(flavors.available())
    if options.version:
        return {"current_version": snapshot.current_version() or None}
    if options.server_version:
        return {"server_version": snapshot.server_version(os.environ)}
    look = _look(options)
    if options.token:
        return as_json.tokens(look)
    if options.hardware:
        return as_json.hardware(look.selected(os.environ), socket.gethostname())
    return as_json.status(look)


def _look(options: argparse.Namespace) -> snapshot.Snapshot:
    look = snapshot.take(os.environ)
    return look if options.idx is None else look.only(options.idx)


if __name__ == "__main__":
    sys.exit(main())
