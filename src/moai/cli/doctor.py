"""`moai doctor`: whether this environment can run, and what to do where it cannot.

In: the interpreter, the installed packages, the machine, the state folder. Out: `Check`s. Nothing here imports torch:
what is asked is what would happen if it were imported.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from moai.plan.errors import PlanError
from moai.plan.parse import VARIABLE, parse
from moai.platform import accelerators, activation, pool, state
from moai.platform.pool import GB, MB

PACKAGE = "moai-accelerator"
LEAST_PYTHON = (3, 10)
LEAST_SHARED_MEMORY = 256 * MB  # containers start with 64 MB, which data loaders outgrow
GPU_FILES = ("/dev/nvidia0", "/dev/kfd")  # there where a driver is loaded: NVIDIA, AMD
SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class Check:
    """One line of the report; `advice` says what to do, and is empty where nothing has to be done."""

    name: str
    found: str
    advice: str = ""

    @property
    def ok(self) -> bool:
        return not self.advice


def examine(environ: Mapping[str, str] = os.environ) -> tuple[Check, ...]:
    """All checks, in the order in which a person would mend things."""
    return (
        python(sys.version_info[:3]),
        *packages(),
        autoload(environ),
        devices(environ),
        accelerator(environ),
        *plan(environ),
        memory(environ),
        *shared_memory(),
        state_folder(environ),
        database(environ),
    )


def python(version: tuple[int, ...]) -> Check:
    found = f"{'.'.join(map(str, version))} ({sys.executable})"
    least = ".".join(map(str, LEAST_PYTHON))
    return Check("Python", found, "" if version[:2] >= LEAST_PYTHON else f"Python {least} or newer is needed.")


def packages(installed: Callable[[str], str] = importlib.metadata.version) -> Iterator[Check]:
    """Each package that this one requires; `installed` gives a version or raises PackageNotFoundError."""
    from packaging.requirements import Requirement

    for requirement in map(Requirement, importlib.metadata.requires(PACKAGE) or ()):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        advice = f"Install it: pip install '{requirement}'"
        try:
            version = installed(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(requirement.name, "not installed", advice)
            continue
        fits = requirement.specifier.contains(version, prereleases=True)
        yield Check(requirement.name, version, "" if fits else f"{requirement.specifier} is needed. {advice}")


def autoload(environ: Mapping[str, str]) -> Check:
    """Whether `cuda` will be the accelerator after `import torch`."""
    name = "import torch"
    for variable in ("TORCH_DEVICE_BACKEND_AUTOLOAD", "MOAI_CUDA"):
        if environ.get(variable) == "0":
            return Check(name, f"does not load the accelerator: {variable}=0", f"Unset {variable}.")
    hooks = importlib.metadata.entry_points(group="torch.backends")
    if not any(hook.value.startswith("moai.") for hook in hooks):
        advice = f"Install the package again: pip install --force-reinstall --no-deps {PACKAGE}"
        return Check(name, "does not know of the accelerator", advice)
    if not activation.wanted(environ):
        advice = "Choose one: moreh-switch-model for all programs, or MOAI_FLAVOR=NAME for one."
        return Check(name, "leaves cuda as it is, for no accelerator has been chosen", advice)
    return Check(name, "finds the accelerator")


def devices(environ: Mapping[str, str]) -> Check:
    """GPUs that the installed torch cannot use are a problem; a machine without GPUs is not."""
    machine = pool.probe(environ)
    found = pool.discover(machine)
    text = f"{len(found)} {'GPU' if machine.cuda_memory_bytes else 'CPU worker'}(s)"
    text += f" of {_size(found[0].memory_bytes)}, {machine.cores} core(s)"
    drivers = [file for file in GPU_FILES if Path(file).exists()]
    if drivers and not machine.cuda_memory_bytes:
        return Check(
            "devices",
            f"{text}; a GPU is there ({drivers[0]}) and is not used",
            "Install a torch that is built for it, and check CUDA_VISIBLE_DEVICES.",
        )
    return Check("devices", text)


def accelerator(environ: Mapping[str, str]) -> Check:
    """What the next program would get."""
    try:
        flavor = accelerators.choose(environ).flavor
    except (ValueError, RuntimeError) as error:
        return Check("accelerator", "none", str(error))
    return Check("accelerator", f"{flavor.name}, {flavor.n_devices} device(s)")


def plan(environ: Mapping[str, str]) -> tuple[Check, ...]:
    """Whether the next program could use the plan that is forced, if one is."""
    text = environ.get(VARIABLE)
    if not text:
        return ()
    try:
        n_devices = accelerators.choose(environ).flavor.n_devices
    except (ValueError, RuntimeError):  # said by the check before this one
        return ()
    try:
        return (Check("plan", str(parse(text, n_devices))),)
    except PlanError as error:
        return (Check("plan", text, str(error)),)


def memory(environ: Mapping[str, str]) -> Check:
    """Whether the host can hold what the CPU workers of the next program may take."""
    import psutil

    free = psutil.virtual_memory().available
    text = f"{_size(free)} of {_size(pool.probe(environ).memory_bytes)} available"
    with suppress(ValueError, RuntimeError):  # said by the check before this one
        flavor = accelerators.choose(environ).flavor
        wanted = sum(d.memory_bytes for d in flavor.devices if d.kind == "cpu")
        if wanted > free:
            return Check(
                "memory",
                f"{text}; the workers of {flavor.name} may take {_size(wanted)}",
                "End other programs, or choose a smaller flavor with moreh-switch-model.",
            )
    return Check("memory", text)


def shared_memory(folder: Path = SHARED_MEMORY) -> Iterator[Check]:
    """Data loaders pass their batches through it. Nothing where the system has no such folder."""
    if not folder.exists():
        return
    size = shutil.disk_usage(folder).total
    advice = "Give the container more: docker run --shm-size=8g" if size < LEAST_SHARED_MEMORY else ""
    yield Check("shared memory", _size(size), advice)


def state_folder(environ: Mapping[str, str]) -> Check:
    """Whether accelerators and jobs can be written down, and by nobody else."""
    folder = state.database(environ).parent
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    name = "state folder"
    if not existing.is_dir() or not os.access(existing, os.R_OK | os.W_OK | os.X_OK):
        advice = f"Make {existing} a folder that you can write, or set XDG_STATE_HOME to one."
        return Check(name, f"{folder} cannot be written", advice)
    if existing == folder and folder.stat().st_mode & 0o022:
        return Check(name, f"{folder} can be written by other users", f"chmod go-w {folder}")
    return Check(name, str(folder))


def database(environ: Mapping[str, str]) -> Check:
    """Whether the file with accelerators and jobs is intact."""
    path = state.database(environ)
    if not path.exists():
        return Check("database", "none yet: the first program makes it")
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=1.0)) as connection:
            (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        advice = f"Check who uses it and its permissions: {path}"
        return Check("database", f"cannot be read ({error})", advice)
    except sqlite3.DatabaseError as error:
        verdict = str(error)
    if verdict != "ok":
        return Check("database", f"damaged ({verdict})", f"Move it away, and start anew: mv {path} {path}.damaged")
    return Check("database", f"{path}, intact")


def _size(size: int) -> str:
    return f"{size / GB:.1f} GB" if size >= GB else f"{size // MB} MB"
