"""What hardware a flavor's devices are, for plans to be predicted on.

In: a flavor, the machine, the operator's file. Out: a `Cluster` with as many devices, each with the flavor's memory.
AcceleratorError, in one line, where there is no description of the hardware, or it is broken.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from moai.plan import cluster_file
from moai.plan.cluster import Cluster
from moai.platform import config, flavors, pool
from moai.platform.device import Device
from moai.platform.errors import AcceleratorError
from moai.platform.flavors import Flavor
from moai.platform.pool import Machine

EXAMPLE = Path(__file__).with_name("flavors_mi250.toml")


def of_name(name: str, environ: Mapping[str, str] = os.environ) -> Cluster:
    """The cluster that the flavor called `name` stands for: one on offer, or else one of the example's."""
    machine = pool.probe(environ)
    offered = flavors.available(machine, environ)
    examples = {**environ, "MOAI_CONFIG": str(EXAMPLE)}
    for known, where in ((offered, environ), (flavors.available(machine, examples), examples)):
        if flavor := flavors.find(name, known):
            return of_flavor(flavor, machine, where)
    raise AcceleratorError(f'There is no flavor "{name}"; there are {", ".join(f.name for f in offered)}.')


def of_flavor(flavor: Flavor, machine: Machine | None = None, environ: Mapping[str, str] = os.environ) -> Cluster:
    """What the operator's file says that its flavors are, or else what the machine's devices are."""
    described = config.load(environ)
    if described.cluster is None:
        return of_devices(flavor.devices, machine)
    try:
        cluster = cluster_file.with_devices(cluster_file.load(described.cluster), flavor.n_devices)
    except ValueError as error:
        raise AcceleratorError(f"The configuration {described.file}, cluster: {error}") from error
    return _with_memory(cluster, flavor.devices)


def of_devices(devices: Sequence[Device], machine: Machine | None = None) -> Cluster:
    """`devices` of this machine."""
    if devices[0].kind == "cpu":
        return _of_workers(devices)
    models = (machine or pool.probe()).cuda_models
    model = models[devices[0].index] if devices[0].index < len(models) else "a GPU whose name the driver does not tell"
    found = _of_model(model, devices[0].memory_bytes)
    if found is None:
        raise AcceleratorError(
            f"There is no description of {model}: there are {', '.join(cluster_file.names())}. Write one (see"
            ' docs/clusters.md), and name it in the configuration: cluster = "PATH".'
        )
    return _here(found, devices)


def _of_model(model: str, memory_bytes: int) -> Cluster | None:
    """The description of this very model, or of the one of its family ("H100") whose memory is nearest."""
    words = set(re.split(r"[\s_-]+", model.lower()))
    known = [cluster_file.load(name) for name in cluster_file.names()]
    family = [c for c in known if c.name.split("-")[0] in words]
    return min(family, key=lambda c: (c.device.name != model, abs(c.device.memory_bytes - memory_bytes)), default=None)


def _of_workers(devices: Sequence[Device]) -> Cluster:
    """The description is of one core."""
    cluster, threads = _here(cluster_file.load("cpu"), devices), devices[0].threads
    device = replace(
        cluster.device,
        memory_bandwidth=cluster.device.memory_bandwidth * threads,
        peak={precision: rate * threads for precision, rate in cluster.device.peak.items()},
    )
    return replace(cluster, device=device)


def _here(cluster: Cluster, devices: Sequence[Device]) -> Cluster:
    return _with_memory(replace(cluster, nodes=1, devices_per_node=len(devices)), devices)


def _with_memory(cluster: Cluster, devices: Sequence[Device]) -> Cluster:
    return replace(cluster, device=replace(cluster.device, memory_bytes=min(d.memory_bytes for d in devices)))
