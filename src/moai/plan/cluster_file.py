"""Cluster files: descriptions of hardware as data.

In: the name of a cluster that comes with the package (the files of `clusters/`), or the path of a TOML file; either may
be followed by a number of devices, as in "h100:64". Out: a `Cluster`. ValueError, in one sentence that says where and
what was expected, for whatever is wrong with a file. docs/clusters.md describes the format.
"""

from __future__ import annotations

import difflib
import math
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any, get_args

from moai.plan.cluster import Cluster, Constant, DeviceModel, Link, Provenance
from moai.plan.work import PRECISIONS

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SHIPPED = Path(__file__).parent / "clusters"
SUFFIX = ".toml"
MOST_NODES = 65_536
_MOST_DEVICES_PER_NODE = 4_096
_MOST_BYTES = 1 << 20

_GIB, _GB, _TERA, _SECOND = 2**30, 1e9, 1e12, 1e6

# What a figure can be, in the unit of its key. A figure outside was given in another unit.
_RANGES = {
    "memory_gib": (0.01, 10_000.0),
    "memory_bandwidth_gb_s": (0.1, 1e6),
    "peak_tflops": (1e-4, 1e6),
    "bandwidth_gb_s": (1e-3, 1e5),
    "latency_us": (0.01, 1e6),
}
_UNITS = {
    "memory_gib": "GiB (2**30 bytes)",
    "memory_bandwidth_gb_s": "GB/s (10**9 bytes a second)",
    "peak_tflops": "TFLOP/s",
    "bandwidth_gb_s": "GB/s (10**9 bytes a second) in each direction",
    "latency_us": "microseconds",
}


def load(text: str) -> Cluster:
    """The cluster called `text`: "h100", "mine.toml", or one of these with a number of devices, as in "h100:64"."""
    name, _, number = text.partition(":") if re.fullmatch(r"[^:]*:\d{1,9}", text) else (text, "", "")
    is_path = name.endswith(SUFFIX) or os.sep in name
    cluster = read(Path(name)) if is_path else _shipped(name)
    return with_devices(cluster, int(number)) if number else cluster


def names() -> tuple[str, ...]:
    """The clusters that come with the package."""
    return tuple(sorted(file.stem for file in SHIPPED.glob(f"*{SUFFIX}")))


def with_devices(cluster: Cluster, n: int) -> Cluster:
    """`n` devices like those of `cluster`, on as few nodes as hold them, each with as many."""
    per_node = cluster.devices_per_node
    if not 1 <= n <= MOST_NODES * per_node:
        raise ValueError(f'A cluster has 1 to {MOST_NODES * per_node} devices of "{cluster.name}", not {n}.')
    if n % _nodes(n, per_node):
        near = [next(m for m in numbers if m % _nodes(m, per_node) == 0) for numbers in (count(n, -1), count(n))]
        raise ValueError(
            f'{n} devices of "{cluster.name}" do not make nodes of one size: a node has {per_node}. The nearest '
            f"numbers that do: {near[0]} or {near[1]}."
        )
    nodes = _nodes(n, per_node)
    return replace(cluster, nodes=nodes, devices_per_node=n // nodes)


def _nodes(n: int, per_node: int) -> int:
    """The fewest that `n` devices fit in."""
    return -(-n // per_node)


def read(file: Path) -> Cluster:
    """The cluster that `file` describes; its name is the file's."""
    return _Reader(file).cluster(_table(file))


def _shipped(name: str) -> Cluster:
    known = {n.lower(): n for n in names()}
    found = known.get(name.lower())
    if found is None:
        raise ValueError(
            f'There is no cluster "{name}".{_nearest(name.lower(), known)} There are {", ".join(names())}; another one '
            f"is given as the path of its {SUFFIX} file."
        )
    return read(SHIPPED / f"{found}{SUFFIX}")


def _table(file: Path) -> dict[str, Any]:
    if not file.is_file():  # a pipe or a device would be read for ever
        raise ValueError(f"The cluster file {file} {'is no file' if file.exists() else 'does not exist'}.")
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError(f"The cluster file {file} is too large to be one: over {_MOST_BYTES >> 20} MiB.")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"The cluster file {file} cannot be read: {error}.") from error
    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # the latter for brackets in brackets in brackets
        raise ValueError(f"The cluster file {file} is not valid TOML: {error}.") from error


class _Reader:
    """Turns the parsed `file` into a Cluster."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def cluster(self, table: dict[str, Any]) -> Cluster:
        self._only(table, "", ("nodes", "devices_per_node", "device", "inside", "between", "constants"))
        return Cluster(
            name=self._file.stem,
            device=self._device(self._of(table, "", "device")),
            nodes=self._count(table, "nodes", MOST_NODES),
            devices_per_node=self._count(table, "devices_per_node", _MOST_DEVICES_PER_NODE),
            inside=self._link(table, "inside"),
            between=self._link(table, "between"),
            constants=self._constants(self._of(table, "", "constants") if "constants" in table else {}),
        )

    def _device(self, table: dict[str, Any]) -> DeviceModel:
        self._only(table, "device", ("name", "kind", "memory_gib", "memory_bandwidth_gb_s", "peak_tflops"))
        name, kind = self._text(table, "device", "name"), self._text(table, "device", "kind")
        if kind not in ("cpu", "cuda"):
            raise self._error("device.kind", 'must be "cuda" (a GPU of NVIDIA or AMD) or "cpu"', kind)
        peak = self._of(table, "device", "peak_tflops")
        self._only(peak, "device.peak_tflops", PRECISIONS)
        if "fp32" not in peak:
            raise self._error("device.peak_tflops.fp32", f"is missing: {_expected('peak_tflops')}")
        return DeviceModel(
            name=name,
            kind="cpu" if kind == "cpu" else "cuda",
            memory_bytes=int(self._figure(table, "device", "memory_gib") * _GIB),
            memory_bandwidth=self._figure(table, "device", "memory_bandwidth_gb_s") * _GB,
            peak={p: self._figure(peak, "device.peak_tflops", p, "peak_tflops") * _TERA for p in peak},
        )

    def _link(self, table: dict[str, Any], name: str) -> Link:
        link = self._of(table, "", name)
        self._only(link, name, ("bandwidth_gb_s", "latency_us"))
        return Link(self._figure(link, name, "bandwidth_gb_s") * _GB, self._figure(link, name, "latency_us") / _SECOND)

    def _constants(self, table: dict[str, Any]) -> dict[str, Constant]:
        return {name: self._constant(self._of(table, "constants", name), f"constants.{name}") for name in table}

    def _constant(self, table: dict[str, Any], path: str) -> Constant:
        self._only(table, path, ("value", "provenance", "low", "high", "source"))
        provenance = self._text(table, path, "provenance")
        if provenance not in get_args(Provenance):
            raise self._error(f"{path}.provenance", f"must be one of {', '.join(get_args(Provenance))}", provenance)
        value, low, high = (self._number(table, path, key, "a number") for key in ("value", "low", "high"))
        if not low <= value <= high:
            raise self._error(f"{path}.value", f"must lie between low, {low:g}, and high, {high:g}", value)
        source = self._text(table, path, "source") if "source" in table else ""
        return Constant(value, provenance, low, high, source)  # type: ignore[arg-type]

    # Values.

    def _of(self, table: dict[str, Any], path: str, key: str) -> dict[str, Any]:
        name = _join(path, key)
        if key not in table:
            raise self._error(name, f"is missing: a table, written as [{name}]")
        found = table[key]
        if not isinstance(found, dict):
            raise self._error(name, f"must be a table, written as [{name}]", found)
        return found

    def _text(self, table: dict[str, Any], path: str, key: str) -> str:
        if key not in table:
            raise self._error(_join(path, key), "is missing: a text in quotes")
        text = table[key]
        if not isinstance(text, str) or not text.strip():
            raise self._error(_join(path, key), "must be a text in quotes", text)
        return text

    def _count(self, table: dict[str, Any], key: str, most: int) -> int:
        expected = f"a whole number from 1 to {most}"
        if key not in table:
            raise self._error(key, f"is missing: {expected}")
        value = table[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise self._error(key, f"must be {expected}", value)
        return value

    def _figure(self, table: dict[str, Any], path: str, key: str, quantity: str = "") -> float:
        """In the unit of its key, or of the `quantity`, if that has another name."""
        low, high = _RANGES[quantity or key]
        value = self._number(table, path, key, _expected(quantity or key))
        if not low <= value <= high:
            raise self._error(_join(path, key), f"must be {_expected(quantity or key)}", value)
        return value

    def _number(self, table: dict[str, Any], path: str, key: str, expected: str) -> float:
        name = _join(path, key)
        if key not in table:
            raise self._error(name, f"is missing: {expected}")
        value = table[key]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not -1e300 < value < 1e300:
            raise self._error(name, f"must be {expected}", value)
        return float(value)

    def _only(self, table: Mapping[str, Any], path: str, known: tuple[str, ...]) -> None:
        for key in table:
            if key not in known:
                there = f"in [{path}]" if path else "there"
                raise self._error(
                    _join(path, key), f"is not known.{_nearest(key, known)} Keys {there}: {', '.join(known)}"
                )

    def _error(self, key: str, text: str, found: Any = None) -> ValueError:
        instead = "" if found is None else f", not {_short(found)}"
        return ValueError(f"The cluster file {self._file}: {_short_text(key)} {text}{instead}.")


def _expected(quantity: str) -> str:
    low, high = _RANGES[quantity]
    return f"a number in {_UNITS[quantity]}, from {low:g} to {high:g}"


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _nearest(name: str, known: Mapping[str, Any] | tuple[str, ...]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1)
    return f' Did you mean "{found[0]}"?' if found else ""


def _short(value: Any) -> str:
    if isinstance(value, (dict, list)):
        return f"a {'table' if isinstance(value, dict) else 'list'}"
    if isinstance(value, int) and abs(value) >= 10**30:  # Python refuses to write very long ones
        return "a number with over 30 digits"
    if isinstance(value, float):
        return "a number that is not finite" if not math.isfinite(value) else f"{value:g}"
    return _short_text(repr(value))


def _short_text(text: str) -> str:
    one_line = " ".join(text.split())
    return one_line if len(one_line) <= 80 else f"{one_line[:77]}..."
