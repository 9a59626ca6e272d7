"""What a person asks of `moai plan`, checked before anything is run.

In: options and arguments as text. Out: a `Request`; AcceleratorError, in one line, for what cannot be.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moai.cli.script import check_script
from moai.plan import cluster_file, parse
from moai.plan.cluster import Cluster
from moai.plan.errors import PlanError
from moai.planning.budget import budget
from moai.platform import accelerators, clusters, config, flavors, pool
from moai.platform.device import Device
from moai.platform.errors import AcceleratorError
from moai.platform.flavors import Flavor

_MULTIPLES = (2, 4, 8, 16)  # of the largest size, that a step is tried on which fits nowhere else


@dataclass(frozen=True, slots=True)
class Target:
    """What to plan for. `name`: as a person knows it; `is_flavor`: whether others like it are on offer; `budget_bytes`:
    what a plan may use of each device; `devices`: those of this machine that it is, if it is."""

    name: str
    cluster: Cluster
    is_flavor: bool
    budget_bytes: int
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True)
class Request:
    """`restricted`: keys of a plan with the only value that they may have; `why`: those of the plan to compare with."""

    target: Target
    restricted: Mapping[str, Any]
    why: Mapping[str, Any] | None
    html: Path | None


def of(
    script: str | None,
    flavor: str | None,
    cluster: str | None,
    restricted: Sequence[str],
    why: str | None,
    html: str | None,
    environ: Mapping[str, str],
) -> Request:
    """The request; see the module's docstring."""
    if script is not None:
        check_script(script)
    try:
        target = _target(flavor, cluster, environ)
    except ValueError as error:
        raise AcceleratorError(str(error)) from None
    n = target.cluster.n_devices
    fixed = _keys(",".join(restricted), n, "--set") if restricted else {}
    wanted = _keys(why, n, "--why") if why is not None else None
    page = Path(html) if html is not None else None
    if page is not None and (page.is_dir() or not os.access(page.absolute().parent, os.W_OK)):
        raise AcceleratorError(
            f"--html {page} cannot be written: give the name of a file in a folder that you can write."
        )
    return Request(target, fixed, wanted, page)


def _keys(text: str, n_devices: int, source: str) -> dict[str, Any]:
    try:
        keys = parse.restrictions(text, n_devices, source)
    except PlanError as error:
        raise AcceleratorError(str(error)) from None
    for key in ("shard", "layers"):
        if key in keys:
            raise AcceleratorError(f"{source}: plans with {key} are not searched for.")
    return keys


def _target(flavor: str | None, cluster: str | None, environ: Mapping[str, str]) -> Target:
    if flavor is not None and cluster is not None:
        raise AcceleratorError("--flavor and --cluster both say where the step would run: give one of them.")
    if cluster is not None:
        try:
            found = cluster_file.load(cluster)
        except ValueError as error:
            raise AcceleratorError(f"--cluster: {error}") from None
        return _sized(f"{found.name}:{found.n_devices}", found, False, environ)
    if flavor is not None:
        here = flavors.find(flavor, flavors.available(pool.probe(environ), environ))
        if here is not None:
            return _of_flavor(here, environ, environ)
        found = clusters.of_name(flavor, environ)
        return _sized(flavor, found, True, environ)
    try:
        chosen = accelerators.choose(environ).flavor
    except (ValueError, RuntimeError) as error:
        raise AcceleratorError(str(error)) from None
    return _of_flavor(chosen, environ, environ)


def _of_flavor(flavor: Flavor, where: Mapping[str, str], environ: Mapping[str, str]) -> Target:
    """`where`: the environment whose operator's file has the flavor."""
    cluster = clusters.of_flavor(flavor, pool.probe(environ), where)
    described = config.load(where).cluster is not None
    return Target(
        flavor.name, cluster, True, budget(cluster.device.memory_bytes, environ), () if described else flavor.devices
    )


def _sized(
    name: str, cluster: Cluster, is_flavor: bool, environ: Mapping[str, str], devices: tuple[Device, ...] = ()
) -> Target:
    return Target(name, cluster, is_flavor, budget(cluster.device.memory_bytes, environ), devices)


def others(target: Target, environ: Mapping[str, str]) -> list[Target]:
    """The same hardware in other sizes, the smallest first: flavors, if it is one, and multiples beyond them."""
    flavored = _flavors(target, environ) if target.is_flavor else []
    most = max([target, *flavored], key=lambda each: each.cluster.n_devices).cluster
    multiples = [cluster_file.with_devices(most, most.n_devices * times) for times in _MULTIPLES]
    beyond = [
        Target(f"{c.n_devices} x {c.device.name}", c, False, budget(c.device.memory_bytes, environ)) for c in multiples
    ]
    return [*flavored, *beyond]


def _flavors(target: Target, environ: Mapping[str, str]) -> list[Target]:
    machine = pool.probe(environ)
    for where in (environ, {**environ, "MOAI_CONFIG": str(clusters.EXAMPLE)}):
        known = flavors.available(machine, where)
        if flavors.find(target.name, known):
            found = [_of_flavor(flavor, where, environ) for flavor in known]
            return sorted(found, key=lambda each: each.cluster.n_devices)
    return []
