"""Flavors: the sizes an accelerator comes in, and which one this process gets.

In: the machine's devices, the environment (MOAI_FLAVOR, MOAI_DEVICES), the user's saved choice. Out: a `Flavor`.

A flavor's name is its size and the total memory of its devices, as in "Medium.8GB". What a machine offers depends on
its devices, so the list is made, not written down.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass

from moai.platform import pool, state
from moai.platform.device import Device
from moai.platform.pool import Machine

SIZES: dict[str, int] = {  # name -> devices
    "Small": 1,
    "Medium": 2,
    "Large": 4,
    "xLarge": 8,
    "1.5xLarge": 12,
    "2xLarge": 16,
    "3xLarge": 24,
    "4xLarge": 32,
    "6xLarge": 48,
    "8xLarge": 64,
    "12xLarge": 96,
    "24xLarge": 192,
    "48xLarge": 384,
}
OTHER_SIZE = "Custom"  # a number of devices that has no name
DEFAULT_CPU_WORKERS = 2


@dataclass(frozen=True, slots=True)
class Flavor:
    """`size` as in `SIZES`; `devices` are those an accelerator of this flavor runs on."""

    size: str
    devices: tuple[Device, ...]

    @property
    def n_devices(self) -> int:
        return len(self.devices)

    @property
    def memory_bytes(self) -> int:
        """Of all devices together."""
        return sum(d.memory_bytes for d in self.devices)

    @property
    def name(self) -> str:
        total = self.memory_bytes
        amount = f"{total // pool.GB}GB" if total >= pool.GB else f"{total // pool.MB}MB"
        return f"{self.size}.{amount}"

    def __str__(self) -> str:
        return self.name


def available(machine: Machine | None = None) -> tuple[Flavor, ...]:
    """What this machine offers, smallest first."""
    machine = machine or pool.probe()
    most = len(pool.discover(machine))
    counts = [n for n in SIZES.values() if n < most] + [most]
    return tuple(_of(n, machine) for n in counts)


def configured(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the user has chosen an accelerator, in the environment or once for all programs. Costs a file check."""
    return bool(environ.get("MOAI_FLAVOR") or environ.get("MOAI_DEVICES") or _saved(environ))


def choose(environ: Mapping[str, str] = os.environ, machine: Machine | None = None) -> Flavor:
    """The flavor of this process: MOAI_FLAVOR, MOAI_DEVICES, the saved choice, or the default.

    The default is the smallest flavor that uses all of the machine's GPUs; on a machine without, two CPU workers
    (one on a single core).

    Raises ValueError for an unknown flavor or a MOAI_DEVICES that is not a positive number, and RuntimeError where
    there are not as many devices.
    """
    machine = machine or pool.probe(environ)
    name, count = environ.get("MOAI_FLAVOR"), environ.get("MOAI_DEVICES")
    if name and count:
        raise ValueError(f"MOAI_FLAVOR={name} and MOAI_DEVICES={count} are both set. Unset one of them.")
    if name:
        return find(name, machine, said_by=f"MOAI_FLAVOR={name}")
    if count:
        if not (count.isascii() and count.isdigit() and int(count) > 0):
            raise ValueError(f"MOAI_DEVICES={count}: a number of devices is expected, 1 or more.")
        return _of(int(count), machine)
    saved = _saved(environ)
    if saved:
        return find(saved, machine, said_by=f"The saved flavor, {saved}")
    if machine.cuda_memory_bytes:
        return _of(len(machine.cuda_memory_bytes), machine)
    return _of(min(DEFAULT_CPU_WORKERS, machine.cores, len(pool.discover(machine))), machine)


def find(name: str, machine: Machine | None = None, said_by: str = "") -> Flavor:
    """The available flavor called `name`; case does not matter, and the memory may be left out ("medium").

    Raises ValueError, starting with `said_by`, where there is none.
    """
    flavors = available(machine)
    for flavor in flavors:
        if name.lower() in (flavor.name.lower(), flavor.size.lower()):
            return flavor
    raise ValueError(
        f"{said_by or name}: no such flavor on this machine. There are: {', '.join(f.name for f in flavors)}."
        " Choose one with MOAI_FLAVOR=NAME."
    )


def save_choice(flavor: Flavor, environ: Mapping[str, str] = os.environ) -> None:
    """Make `flavor` the one that the user's later programs get.

    Raises OSError or sqlite3.Error where the state folder cannot be written.
    """
    state.save_setting("flavor", flavor.size, environ)


def _of(n: int, machine: Machine) -> Flavor:
    size = next((size for size, count in SIZES.items() if count == n), OTHER_SIZE)
    return Flavor(size, pool.take(n, machine))


def _saved(environ: Mapping[str, str]) -> str | None:
    try:
        return state.setting("flavor", environ)
    except (OSError, sqlite3.Error):  # an unreadable choice is no choice: `import torch` must not fail over it
        return None
