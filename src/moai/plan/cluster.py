"""Cluster: what the devices are, how many there are, and how they are connected.

In: written down in a TOML file (`plan/clusters/`, or the user's own). Out: read by `plan`, which predicts times from
it where nothing was measured.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Provenance = Literal["datasheet", "measured", "fitted", "assumed"]


@dataclass(frozen=True, slots=True)
class Constant:
    """A number that the cost model needs, where it comes from, and what is physically possible."""

    value: float
    provenance: Provenance
    low: float
    high: float
    source: str = ""

    @property
    def at_bound(self) -> bool:
        return self.value in (self.low, self.high)


@dataclass(frozen=True, slots=True)
class Link:
    """`bandwidth`: bytes a second that one device sends while it receives as many; `latency_s`: of one message."""

    bandwidth: float
    latency_s: float


@dataclass(frozen=True, slots=True)
class DeviceModel:
    """One schedulable device. `peak`: FLOP/s of dense matrix products by precision (`plan.work` lists
    them), of which one that is missing is computed as the next wider one; `memory_bandwidth`: bytes/s."""

    name: str
    kind: Literal["cpu", "cuda"]
    memory_bytes: int
    memory_bandwidth: float
    peak: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Cluster:
    """`nodes` nodes of `devices_per_node` devices. `inside`: the link of a device to the others of its node;
    `between`: a device's share of its node's network, when all devices of the node send. `constants`: what the cost
    model calibrates for this hardware, by name."""

    name: str
    device: DeviceModel
    nodes: int
    devices_per_node: int
    inside: Link
    between: Link
    constants: Mapping[str, Constant] = field(default_factory=dict)

    @property
    def n_devices(self) -> int:
        return self.nodes * self.devices_per_node
