"""Flavors: the sizes an accelerator comes in.

In: the machine's devices, the operator's file. Out: the `Flavor`s on offer.

A flavor's name is its size and the total memory of its devices, as in "Medium.8GB". What a machine offers depends on
its devices, so the list is made, not written down; an operator's file (`moai.platform.config`) takes its place.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from moai.platform import config, pool
from moai.platform.config import FlavorEntry
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
    """`size` as in `SIZES`; `devices` are those an accelerator of this flavor runs on; `label` is the name that an
    operator gave it, if one did."""

    size: str
    devices: tuple[Device, ...]
    label: str = ""

    @property
    def n_devices(self) -> int:
        return len(self.devices)

    @property
    def memory_bytes(self) -> int:
        """Of all devices together."""
        return sum(d.memory_bytes for d in self.devices)

    @property
    def name(self) -> str:
        if self.label:
            return self.label
        total = self.memory_bytes
        amount = f"{total // pool.GB}GB" if total >= pool.GB else f"{total // pool.MB}MB"
        return f"{self.size}.{amount}"

    def __str__(self) -> str:
        return self.name


def available(machine: Machine | None = None, environ: Mapping[str, str] = os.environ) -> tuple[Flavor, ...]:
    """What is on offer: the flavors of the operator's file in its order, or else what this machine has, smallest first.

    Raises AcceleratorError where the file is broken.
    """
    machine = machine or pool.probe(environ)
    entries = config.load(environ).flavors
    if entries:
        return tuple(_of_entry(entry, machine) for entry in entries)
    most = len(pool.discover(machine))
    counts = [n for n in SIZES.values() if n < most] + [most]
    return tuple(_of_machine(n, machine) for n in counts)


def default(offered: Sequence[Flavor], machine: Machine) -> Flavor:
    """For who has not chosen: all of the machine's GPUs; on a machine without, two CPU workers (one on a single core).

    If no flavor has as many devices, the next smaller, or else the smallest.
    """
    wanted = len(machine.cuda_memory_bytes) or min(DEFAULT_CPU_WORKERS, machine.cores)
    fitting = [f for f in offered if f.n_devices <= wanted]
    return max(fitting, key=lambda f: f.n_devices) if fitting else min(offered, key=lambda f: f.n_devices)


def find(name: str, offered: Sequence[Flavor]) -> Flavor | None:
    """The flavor called `name`, if it is on offer; case does not matter, and the memory may be left out ("medium")."""
    for key in (lambda f: f.name, lambda f: f.size):
        for flavor in offered:
            if key(flavor).lower() == name.lower():
                return flavor
    return None


def of_count(n: int, offered: Sequence[Flavor], machine: Machine) -> Flavor:
    """A flavor of exactly `n` devices, on offer or not. RuntimeError where there are not as many."""
    return next((f for f in offered if f.n_devices == n), None) or _of_machine(n, machine)


def size_of(name: str) -> str:
    """ "Medium" of "Medium.8GB"."""
    return name.rpartition(".")[0] or name


def _of_machine(n: int, machine: Machine) -> Flavor:
    size = next((size for size, count in SIZES.items() if count == n), OTHER_SIZE)
    return Flavor(size, pool.take(n, machine))


def _of_entry(entry: FlavorEntry, machine: Machine) -> Flavor:
    kind: Literal["cpu", "cuda"] = "cuda" if machine.cuda_memory_bytes else "cpu"
    threads = max(1, machine.cores // entry.devices)
    devices = tuple(Device(kind, i, entry.memory_mib * pool.MB, threads) for i in range(entry.devices))
    return Flavor(size_of(entry.name), devices, entry.name)
