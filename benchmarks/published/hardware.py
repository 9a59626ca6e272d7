"""What hardware a published run names.

In: the column `hw`, such as "A100-80GB-SXM (Selene, 8xHDR200/node)". Out: the name of the description that fits it,
whose constants it has, and its Cluster: that description, with what the text says otherwise (links, power, memory).
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import cache

from moai.plan.cluster import Cluster, Link
from moai.plan.cluster_file import load, with_devices


class UnknownHardware(ValueError):
    """There is no description of such hardware."""


# What a text must hold, most special first.
_NAMES = (
    (r"GB200", "gb200"),
    (r"B200", "b200"),
    (r"H200", "h200"),
    (r"H100-96GB", "h100-96"),
    (r"H100", "h100"),
    (r"A100.*?40", "a100-40"),
    (r"A100", "a100-80"),
    (r"V100.*?16|p3\.16", "v100-16"),
    (r"V100", "v100-32"),
    (r"MI300X?", "mi300x"),
    (r"MI250", "mi250"),
    (r"MI210", "mi210"),
)
_INFINIBAND = {"EDR": 100.0, "HDR": 200.0, "NDR": 400.0}  # Gb/s
_WATTS = {"h100": 700.0}  # of the descriptions
# Rates of products follow the clock, and the clock roughly the root of the power that is left.
_POWER = 0.5


def hardware_of(text: str, devices: int) -> tuple[str, Cluster]:
    """Raises UnknownHardware."""
    name = next((name for pattern, name in _NAMES if re.search(pattern, text, re.IGNORECASE)), None)
    if name is None:
        raise UnknownHardware(f"there is no description of the hardware {text!r}")
    cluster = _described(name)
    if re.search("DGX-2", text):
        cluster = replace(cluster, devices_per_node=16)
    watts = re.search(r"(\d+)\s*W\b", text)
    if watts and name in _WATTS and float(watts[1]) != _WATTS[name]:
        share = (float(watts[1]) / _WATTS[name]) ** _POWER
        peak = {p: rate * share for p, rate in cluster.device.peak.items()}
        cluster = replace(cluster, device=replace(cluster.device, peak=peak))
    bandwidth = re.search(r"([\d.]+)\s*TB/s", text)
    if bandwidth:
        cluster = replace(cluster, device=replace(cluster.device, memory_bandwidth=float(bandwidth[1]) * 1e12))
    network = _network(text, cluster.devices_per_node)
    if network:
        cluster = replace(cluster, between=Link(network, cluster.between.latency_s))
    try:
        return name, with_devices(cluster, devices)
    except ValueError as error:
        raise UnknownHardware(str(error)) from None


def _network(text: str, per_node: int) -> float | None:
    """Bytes a second of a device's share of its node's network."""
    found = re.search(r"(?:(\d+)\s*x\s*)?([\d.]+)\s*(?:Gb/s|Gbps|Gbit/s)\s*(/GPU)?", text)
    if found:
        return int(found[1] or 1) * float(found[2]) * 1e9 / 8 / (1 if found[3] else per_node)
    found = re.search(r"(?:(\d+)\s*x\s*)?(EDR|HDR|NDR)(\d*)", text)
    if found:
        return int(found[1] or per_node) * float(found[3] or _INFINIBAND[found[2]]) * 1e9 / 8 / per_node
    return None


@cache
def _described(name: str) -> Cluster:
    return load(name)
