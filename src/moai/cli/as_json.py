"""What `--json` prints, as plain dictionaries and lists.

In: what the screens take. Out: objects for `json.dumps`. Memory in bytes, times in seconds since the epoch, utilization
from 0 to 1; what is not known is null.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from moai.cli.snapshot import Snapshot
from moai.platform.accelerators import Accelerator
from moai.platform.flavors import Flavor


def status(snapshot: Snapshot) -> dict[str, Any]:
    return {
        "time": snapshot.now,
        "name": snapshot.name,
        "current_version": snapshot.version or None,
        "latest_version": snapshot.latest_version,
        "accelerators": [accelerator(a) for a in snapshot.accelerators],
    }


def accelerator(accelerator: Accelerator) -> dict[str, Any]:
    job = accelerator.job
    return {**model(accelerator), "job": None if job is None else {**asdict(job), "plan": job.plan or None}}


def model(accelerator: Accelerator) -> dict[str, Any]:
    return {"id": accelerator.id, "default": accelerator.is_default, **flavor(accelerator.flavor)}


def models(accelerators: Sequence[Accelerator]) -> list[dict[str, Any]]:
    return [model(a) for a in accelerators]


def hardware(accelerator: Accelerator, node: str) -> list[dict[str, Any]]:
    """One object a physical device; `node` is the name of the machine, for devices that are idle."""
    if accelerator.job is not None and accelerator.job.usage.devices:
        return [asdict(device) for device in accelerator.job.usage.devices]
    return [
        {
            "node": node,
            "index": device.index,
            "memory_bytes": None,
            "total_bytes": device.memory_bytes,
            "utilization": None,
            "temperature": None,
        }
        for device in accelerator.flavor.devices
    ]


def tokens(snapshot: Snapshot) -> list[dict[str, Any]]:
    return [{**model(a), "token": snapshot.token} for a in snapshot.accelerators]


def flavor(flavor: Flavor) -> dict[str, Any]:
    return {"flavor": flavor.name, "devices": flavor.n_devices, "total_memory_bytes": flavor.memory_bytes}


def flavors(offered: Sequence[Flavor]) -> list[dict[str, Any]]:
    """In the order, and with the numbers, in which they can be chosen."""
    return [{"number": i, **flavor(f)} for i, f in enumerate(offered, 1)]
