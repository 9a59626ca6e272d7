"""One look at the platform: what the screens show and `--json` prints.

In: the environment. Out: a `Snapshot`, read once for all tables of a screen.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moai.platform import accelerators as platform
from moai.platform import config, log
from moai.platform.accelerators import Accelerator, AcceleratorError
from moai.version import __version__


@dataclass(frozen=True, slots=True)
class Snapshot:
    """`now` in seconds since the epoch; `version` as in `current_version`."""

    now: float
    name: str
    version: str
    latest_version: str
    token: str
    accelerators: tuple[Accelerator, ...]

    def only(self, accelerator_id: int) -> Snapshot:
        """The same with one accelerator. Raises AcceleratorError if there is none with that id."""
        chosen = tuple(a for a in self.accelerators if a.id == accelerator_id)
        if not chosen:
            ids = ", ".join(str(a.id) for a in self.accelerators)
            raise AcceleratorError(f"There is no accelerator {accelerator_id}. There are: {ids}.")
        return replace(self, accelerators=chosen)

    def selected(self, environ: Mapping[str, str]) -> Accelerator:
        """What this environment's programs use; if only one accelerator is looked at, that one."""
        return self.accelerators[0] if len(self.accelerators) == 1 else selected(self.accelerators, environ)


def take(environ: Mapping[str, str]) -> Snapshot:
    """Raises AcceleratorError where the platform's state cannot be read."""
    return Snapshot(
        now=time.time(),
        name=log.display_name(environ),
        version=current_version(),
        latest_version=config.load(environ).latest_version or __version__,
        token=platform.token(environ),
        accelerators=platform.accelerators(environ),
    )


def current_version() -> str:
    """The version in this environment; "" if it cannot run, because torch is not installed."""
    return __version__ if importlib.util.find_spec("torch") else ""


def server_version(environ: Mapping[str, str]) -> str:
    """The version that the operator's file names, or else this one: without a cluster, the server is this machine."""
    return config.load(environ).server_version or __version__


def selected(accelerators: Sequence[Accelerator], environ: Mapping[str, str]) -> Accelerator:
    """The one that MOREH_VISIBLE_DEVICE or MOREH_VISIBLE_DEVICES names, or else the default one.

    Raises AcceleratorError where it names none of them.
    """
    for name in ("MOREH_VISIBLE_DEVICE", "MOREH_VISIBLE_DEVICES"):
        text = environ.get(name)
        if text:
            for accelerator in accelerators:
                if text == str(accelerator.id):
                    return accelerator
            ids = ", ".join(str(a.id) for a in accelerators)
            raise AcceleratorError(f"{name}={text}: there is no such accelerator. There are: {ids}.")
    return next(a for a in accelerators if a.is_default)
