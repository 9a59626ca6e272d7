"""Where profiles are kept: a file for each kind of hardware, in moai/profiles in $XDG_CACHE_HOME (~/.cache).

In: devices, a Profile. Out: the Profile of these devices, if they were measured. A file is there whole or not at all.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch

from moai.lower.cache_folder import home
from moai.plan.profile import Hardware, Profile
from moai.platform import pool
from moai.platform.device import Device
from moai.platform.pool import Machine

logger = logging.getLogger("moai")


def hardware(devices: Sequence[Device], machine: Machine | None = None) -> Hardware:
    """What a profile of `devices` holds for."""
    first = devices[0]
    return Hardware(first.kind, pool.model(first, machine), len(devices), first.threads, torch.__version__)


def file_of(hardware: Hardware, environ: Mapping[str, str] = os.environ) -> Path:
    """The file of a profile."""
    text = f"{hardware.model}-{hardware.devices}x{hardware.threads}-torch{hardware.torch}"
    return home(environ) / "profiles" / f"{re.sub(r'[^a-z0-9.]+', '-', text.lower())}.json"


def find(devices: Sequence[Device], environ: Mapping[str, str] = os.environ) -> Profile | None:
    """The profile of `devices`. A file that is damaged is as good as none, and is said."""
    wanted = hardware(devices)
    file = file_of(wanted, environ)
    try:
        profile = Profile.from_json(json.loads(file.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        logger.warning("The profile %s is of no use (%s): `moai profile` makes it anew.", file, error)
        return None
    return profile if profile.hardware == wanted else None


def save(profile: Profile, environ: Mapping[str, str] = os.environ) -> Path:
    """The file that now has it. OSError where it cannot be written."""
    file = file_of(profile.hardware, environ)
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=file.parent, prefix=".", suffix=".json")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as written:
            json.dump(profile.to_json(), written)
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise
    return file
