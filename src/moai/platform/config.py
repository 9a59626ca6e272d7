"""What an operator says about the platform: a TOML file with flavors, the accelerator's name, and versions.

In: MOAI_CONFIG, or else flavors.toml in $XDG_CONFIG_HOME/moai (~/.config/moai) or in /etc/moai. Out: a `Config`, empty
where there is no file. `flavors_mi250.toml` beside this module is an example.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.platform.errors import AcceleratorError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SYSTEM_FILE = Path("/etc/moai/flavors.toml")
MOST_DEVICES = 65536  # more is a slip


@dataclass(frozen=True, slots=True)
class FlavorEntry:
    """A flavor of the file: `memory_mib` (2**20 bytes) is that of each of its `devices`."""

    name: str
    devices: int
    memory_mib: int


@dataclass(frozen=True, slots=True)
class Config:
    """What the file says; None and () stand for what it does not say. `cluster`: what the flavors' devices are, as
    `plan.cluster_file.load` takes it."""

    file: Path | None = None
    display_name: str | None = None
    server_version: str | None = None
    latest_version: str | None = None
    flavors: tuple[FlavorEntry, ...] = ()
    cluster: str | None = None


def load(environ: Mapping[str, str] = os.environ) -> Config:
    """The operator's file, read and checked. AcceleratorError, with file and line, where it is broken."""
    file = find(environ)
    if file is None:
        return Config()
    try:
        text = file.read_text(encoding="utf-8")
        table = tomllib.loads(text)
    except (OSError, UnicodeDecodeError) as error:
        raise AcceleratorError(f"The configuration {file} cannot be read: {error}.") from error
    except tomllib.TOMLDecodeError as error:
        last = len(text.splitlines())
        reason = str(error).replace("at end of document", f"at line {last}, the end")  # else "at line N, column M"
        raise AcceleratorError(f"The configuration {file} is not valid TOML: {reason}.") from error
    return _Checker(file, text).config(table)


def find(environ: Mapping[str, str] = os.environ) -> Path | None:
    """The operator's file, if there is one."""
    named = environ.get("MOAI_CONFIG")
    if named:
        return Path(named)
    base, home = environ.get("XDG_CONFIG_HOME"), environ.get("HOME")
    folder = Path(base) if base else (Path(home) if home else Path.home()) / ".config"
    return next((file for file in (folder / "moai" / "flavors.toml", SYSTEM_FILE) if file.is_file()), None)


class _Checker:
    """Turns a parsed file into a `Config`, and knows in which line what it complains about stands."""

    def __init__(self, file: Path, text: str) -> None:
        self._file = file
        self._lines = text.splitlines()

    def config(self, table: dict[str, Any]) -> Config:
        self._only(table, ("display_name", "cluster", "versions", "flavor"), line=1)
        versions = table.get("versions", {})
        if not isinstance(versions, dict):
            raise self._error(self._line_of("versions"), "[versions] must be a table")
        self._only(versions, ("server", "latest"), line=self._line_of("[versions]"))
        entries = table.get("flavor", [])
        if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
            raise self._error(self._line_of("flavor"), "flavors are written as [[flavor]]")
        return Config(
            self._file,
            self._text(table, "display_name", 1),
            self._text(versions, "server", self._line_of("[versions]")),
            self._text(versions, "latest", self._line_of("[versions]")),
            self._flavors(entries),
            self._text(table, "cluster", 1),
        )

    def _flavors(self, entries: list[dict[str, Any]]) -> tuple[FlavorEntry, ...]:
        starts = [i for i, line in enumerate(self._lines, 1) if line.replace(" ", "").startswith("[[flavor]]")]
        flavors: dict[str, FlavorEntry] = {}
        for i, entry in enumerate(entries):
            line = starts[i] if i < len(starts) else self._line_of("flavor")
            flavor = self._flavor(entry, line)
            if flavor.name.lower() in flavors:
                raise self._error(self._line_of("name", line), f"there are two flavors named {flavor.name}")
            flavors[flavor.name.lower()] = flavor
        return tuple(flavors.values())

    def _flavor(self, entry: dict[str, Any], line: int) -> FlavorEntry:
        self._only(entry, ("name", "devices", "memory_mib"), line)
        name = self._text(entry, "name", line)
        if name is None:
            raise self._error(line, "a flavor needs a name")
        devices = self._number(entry, "devices", line, MOST_DEVICES)
        return FlavorEntry(name, devices, self._number(entry, "memory_mib", line, 2**40))

    def _text(self, table: dict[str, Any], key: str, line: int) -> str | None:
        value = table.get(key)
        if value is None:
            return None
        if not isinstance(value, str) or not value.strip() or not value.isprintable():
            raise self._error(self._line_of(key, line), f"{key} must be a text of one line, in quotes")
        return value

    def _number(self, table: dict[str, Any], key: str, line: int, most: int) -> int:
        value = table.get(key)
        if value is None:
            raise self._error(line, f"a flavor needs {key}, a whole number")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self._error(self._line_of(key, line), f"{key} must be a whole number from 1 to {most}")
        return value

    def _only(self, table: dict[str, Any], known: tuple[str, ...], line: int) -> None:
        for key in table:
            if key not in known:
                raise self._error(self._line_of(key, line), f"{key} is not known here; there are {', '.join(known)}")

    def _line_of(self, start: str, after: int = 1) -> int:
        """The first line from `after` on that starts with `start`."""
        for number, line in enumerate(self._lines[after - 1 :], after):
            if line.strip().strip("[\"'").startswith(start.strip("[")):
                return number
        return after

    def _error(self, line: int, text: str) -> AcceleratorError:
        return AcceleratorError(f"The configuration {self._file}, line {line}: {text}.")
