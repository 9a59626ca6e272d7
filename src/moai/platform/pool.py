"""The physical devices of this machine.

In: what the operating system and the NVIDIA driver say. Out: `Device`s, for flavors to be made of.

Nothing here imports torch or creates a CUDA context: it runs inside `import torch`, in a process that never
computes. Where the installed torch cannot use CUDA, or no GPU is visible, a device is a CPU worker: a process with a
fixed number of threads and a memory budget.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moai.platform.device import Device

MB = 2**20
GB = 2**30

CPU_WORKERS = 4  # devices of a machine without GPUs; may be more than it has cores
CPU_MEMORY_SHARE = 0.8  # of the machine's memory, for all CPU workers together
CPU_WORKER_LEAST = 256 * MB  # a process that has imported torch needs about this much to be of any use


@dataclass(frozen=True, slots=True)
class Machine:
    """`cores` this process may use, `memory_bytes` of RAM; the memory in bytes of every visible CUDA device, its UUID,
    which is the same for programs with different CUDA_VISIBLE_DEVICES, and the name of its model."""

    cores: int
    memory_bytes: int
    cuda_memory_bytes: tuple[int, ...] = ()
    cuda_uuids: tuple[str, ...] = ()
    cuda_models: tuple[str, ...] = ()


def probe(environ: Mapping[str, str] = os.environ) -> Machine:
    """This machine, as the process may use it (CPU affinity, container limits, CUDA_VISIBLE_DEVICES)."""
    cuda = _nvml_devices(environ.get("CUDA_VISIBLE_DEVICES")) if _torch_has_cuda() else ()
    uuids, sizes, models = zip(*cuda, strict=True) if cuda else ((), (), ())
    return Machine(_cores(), _memory(), sizes, uuids, models)


def discover(machine: Machine | None = None) -> tuple[Device, ...]:
    """All devices of the machine: its CUDA devices, or else `CPU_WORKERS` CPU workers (fewer if memory is short)."""
    machine = machine or probe()
    if machine.cuda_memory_bytes:
        return take(len(machine.cuda_memory_bytes), machine)
    return take(max(1, min(CPU_WORKERS, _most_cpu_workers(machine))), machine)


def take(n: int, machine: Machine | None = None) -> tuple[Device, ...]:
    """Exactly `n` devices; they share the machine's cores.

    CPU workers may be more than `CPU_WORKERS`; they get smaller memory budgets then.

    Raises RuntimeError where the machine has fewer devices, or no memory for as many CPU workers.
    """
    machine = machine or probe()
    threads = max(1, machine.cores // n)
    if machine.cuda_memory_bytes:
        if n > len(machine.cuda_memory_bytes):
            raise RuntimeError(
                f"no free device: {n} were asked for and {len(machine.cuda_memory_bytes)} CUDA device(s) are visible"
                " here. Ask for fewer, or check CUDA_VISIBLE_DEVICES."
            )
        return tuple(Device("cuda", i, memory, threads) for i, memory in enumerate(machine.cuda_memory_bytes[:n]))
    if n > _most_cpu_workers(machine):
        raise RuntimeError(
            f"no free device: {n} CPU worker(s) of at least {CPU_WORKER_LEAST // MB} MB do not fit in"
            f" {CPU_MEMORY_SHARE:.0%} of this machine's {machine.memory_bytes // MB:,} MB of memory. The most that do"
            f" is {_most_cpu_workers(machine)}."
        )
    budget = max(CPU_WORKER_LEAST, _cpu_budget(max(n, CPU_WORKERS), machine))
    return tuple(Device("cpu", i, budget, threads) for i in range(n))


def names(machine: Machine, at_least: int = 0) -> tuple[str, ...]:
    """What the devices are called among all programs of the machine, in the order of their indices.

    Of CPU workers, there are `at_least` so many: they are no fixed number of things.
    """
    if machine.cuda_memory_bytes:
        return machine.cuda_uuids or tuple(f"cuda:{i}" for i in range(len(machine.cuda_memory_bytes)))
    return tuple(f"cpu:{i}" for i in range(max(at_least, len(discover(machine)))))


def at(device: Device, index: int, machine: Machine) -> Device:
    """`device`, of some flavor, in the place of the machine's device `index`."""
    if not machine.cuda_memory_bytes:
        return replace(device, index=index)
    return replace(device, index=index, memory_bytes=min(device.memory_bytes, machine.cuda_memory_bytes[index]))


def check(devices: Sequence[Device], machine: Machine) -> None:
    """Raises RuntimeError where the machine could not run a job on `devices` even if nothing else ran."""
    n = len(devices)
    if machine.cuda_memory_bytes:
        if n > len(machine.cuda_memory_bytes):
            raise RuntimeError(
                f"no free device: {n} were asked for and {len(machine.cuda_memory_bytes)} CUDA device(s) are visible"
                " here. Ask for fewer, or check CUDA_VISIBLE_DEVICES."
            )
        return
    total = sum(d.memory_bytes for d in devices)
    if total > machine.memory_bytes * CPU_MEMORY_SHARE:
        raise RuntimeError(
            f"no free device: {n} CPU worker(s) of {total // n // MB:,} MB do not fit in {CPU_MEMORY_SHARE:.0%} of this"
            f" machine's {machine.memory_bytes // MB:,} MB of memory. Choose a smaller flavor."
        )


def _cpu_budget(n: int, machine: Machine) -> int:
    """The largest power of two of bytes such that `n` workers fit in the share of memory that is theirs."""
    share = int(machine.memory_bytes * CPU_MEMORY_SHARE) // n
    return 1 << (share.bit_length() - 1)


def _most_cpu_workers(machine: Machine) -> int:
    return int(machine.memory_bytes * CPU_MEMORY_SHARE) // CPU_WORKER_LEAST


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int:
    """Bytes of RAM, or the container's limit where that is smaller."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = [physical]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such file, or "max": no limit
            continue
    return min(limits)


def _torch_has_cuda() -> bool:
    """Whether the installed torch is a CUDA build; a CPU build cannot use a GPU that the driver lists."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    return (Path(spec.origin).parent / "lib" / "libtorch_cuda.so").exists()


_CHARACTERS = 96  # the most that NVML writes for a UUID or a name, its zero byte included


class _NvmlMemory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def _nvml_devices(visible: str | None) -> tuple[tuple[str, int, str], ...]:
    """(UUID, memory in bytes, model) of the CUDA devices that `visible` (CUDA_VISIBLE_DEVICES, None if unset) lets us
    see."""
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return ()
    if nvml.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        names = visible_names(visible, count.value)
        found = []
        for name in names:
            handle = ctypes.c_void_p()
            if name.isdigit():
                status = nvml.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(handle))
            else:
                status = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
            memory = _NvmlMemory()
            if status != 0 or nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) != 0:
                break
            uuid, model = (ctypes.create_string_buffer(_CHARACTERS) for _ in range(2))
            if nvml.nvmlDeviceGetUUID(handle, uuid, len(uuid)) or nvml.nvmlDeviceGetName(handle, model, len(model)):
                break
            found.append((uuid.value.decode(), memory.total, model.value.decode()))
        return tuple(found)
    finally:
        nvml.nvmlShutdown()


def visible_names(visible: str | None, count: int) -> tuple[str, ...]:
    """The entries of CUDA_VISIBLE_DEVICES that count, by CUDA's rule: those before the first invalid one."""
    if visible is None:
        return tuple(map(str, range(count)))
    names: list[str] = []
    for name in (part.strip() for part in visible.split(",")):
        valid = int(name) < count if name.isdigit() else name.startswith(("GPU-", "MIG-"))
        if not valid:
            break
        names.append(name)
    return tuple(names)
