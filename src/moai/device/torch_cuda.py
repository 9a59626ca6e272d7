"""`torch.cuda` for a machine whose one GPU is the accelerator.

In: `torch.cuda`, built with or without CUDA. Out: the same module, answering for the accelerator. The functions here
and in `torch_cuda_memory` and `torch_cuda_streams` have the names, arguments and results of those that they stand
for; what is not replaced (NCCL, CUDA graphs, NVML readings) keeps failing as torch without CUDA does.

The module is also registered as `torch.moai`, which is where C++ and torch's generic code look for the device's module.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from moai.device import generator, owner, rng, torch_cuda_memory, torch_cuda_streams
from moai.device.torch_device import invalid_ordinal

CAPABILITY = (9, 0)  # what scripts use to decide whether bf16 and fused kernels are worth trying

_opened_in: int | None = None  # the process that has used the device


@dataclass(frozen=True)
class DeviceProperties:
    """What `torch.cuda.get_device_properties` returns."""

    name: str
    total_memory: int
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    multi_processor_count: int = 132
    warp_size: int = 32
    max_threads_per_multi_processor: int = 2048
    regs_per_multiprocessor: int = 65536
    shared_memory_per_block_optin: int = 232448
    is_integrated: int = 0
    is_multi_gpu_board: int = 0
    gcnArchName: str = ""


def is_available() -> bool:
    return True


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def is_initialized() -> bool:
    return not _is_in_bad_fork()


def init() -> None:
    _lazy_init()


def _lazy_init() -> None:
    """First use of the device: opens the session, which registers the operators' kernels. Called by C++ too."""
    global _opened_in
    if _is_in_bad_fork():
        raise RuntimeError(
            "Cannot re-initialize CUDA in forked subprocess. To use CUDA with multiprocessing, you must use the "
            "'spawn' start method"
        )
    if _opened_in is None:
        from moai.device import autocast

        owner.current()
        autocast.install()
        _opened_in = os.getpid()


def _is_in_bad_fork() -> bool:
    return _opened_in not in (None, os.getpid())


def set_device(device: Any) -> None:
    check_index(device)


def _exchange_device(device: int) -> int:
    check_index(device)
    return 0


def _maybe_exchange_device(device: int) -> int:
    # Not the same object as the function above: torch.compile refuses one function under two names.
    return _exchange_device(device)


def check_index(device: Any) -> None:
    """Raises RuntimeError for a device other than the one there is. None and negative indices mean the current one."""
    index = device if isinstance(device, int) or device is None else torch.device(device).index
    if index is not None and index > 0:
        raise RuntimeError(invalid_ordinal(index))


def get_device_name(device: Any = None) -> str:
    """The accelerator's display name. Asking for it acquires the accelerator."""
    check_index(device)
    owner.current().acquire()
    return _name()


def get_device_properties(device: Any = None) -> DeviceProperties:
    """Name and size of the accelerator; acquires nothing."""
    check_index(device)
    return DeviceProperties(_name(), total_memory=torch_cuda_memory.mem_get_info()[1])


def get_device_capability(device: Any = None) -> tuple[int, int]:
    check_index(device)
    return CAPABILITY


def is_bf16_supported(including_emulation: bool = True) -> bool:
    return True


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


def get_arch_list() -> list[str]:
    return [f"sm_{CAPABILITY[0]}{CAPABILITY[1]}"]


def can_device_access_peer(device: Any, peer_device: Any) -> bool:
    check_index(device)
    check_index(peer_device)
    return False


def synchronize(device: Any = None) -> None:
    """Returns when everything that the script has asked for is done."""
    check_index(device)
    owner.current().synchronize()


def _accelerator_synchronize(device: Any = None) -> None:
    # Not the same object as the function above, for torch.compile again.
    synchronize(device)


def ipc_collect() -> None:
    pass


def get_rng_state(device: Any = "cuda") -> torch.Tensor:
    check_index(device)
    return rng.get_state()


def set_rng_state(new_state: torch.Tensor, device: Any = "cuda") -> None:
    check_index(device)
    rng.set_state(new_state)


def get_rng_state_all() -> list[torch.Tensor]:
    return [rng.get_state()]


def set_rng_state_all(new_states: Iterable[torch.Tensor]) -> None:
    """Takes one state, as there is one device.

    Raises RuntimeError for several, e.g. from a checkpoint written with more GPUs.
    """
    states = list(new_states)
    if len(states) != 1:
        raise RuntimeError(f"One state is expected, for the one device there is; got {len(states)}.")
    rng.set_state(states[0])


def manual_seed(seed: int) -> None:
    rng.manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    rng.manual_seed(seed)


def seed() -> None:
    rng.manual_seed(int.from_bytes(os.urandom(7), "little"))


def seed_all() -> None:
    seed()


def initial_seed() -> int:
    return rng.initial_seed()


class _NoRanges:
    """NVTX ranges name regions for a profiler of this process, where nothing is computed."""

    rangePushA = rangePop = rangeEnd = markA = staticmethod(lambda *args: 0)
    rangeStartA = deviceRangeStart = deviceRangeEnd = staticmethod(lambda *args: 0)


def install() -> None:
    """Puts the replacements into `torch.cuda`, and into its submodules where they hold the same names."""
    replaced = {name: globals()[name] for name in _REPLACED}
    replaced |= {name: getattr(torch_cuda_memory, name) for name in torch_cuda_memory.__all__}
    replaced |= {name: getattr(torch_cuda_streams, name) for name in torch_cuda_streams.__all__}
    for name, value in replaced.items():
        setattr(torch.cuda, name, value)
        for submodule in (torch.cuda.memory, torch.cuda.random, torch.cuda.streams):
            if hasattr(submodule, name):
                setattr(submodule, name, value)
    torch.cuda._initialized = True  # torch.utils.checkpoint saves the random state of initialized devices only
    torch.cuda.default_generators = (generator.default(),)
    setattr(torch.cuda.nvtx, "_nvtx", _NoRanges)  # noqa: B010  (a name that exists only in some builds)
    for name in torch_cuda_memory.GENERIC:
        setattr(torch.accelerator, name, getattr(torch_cuda_memory, name))
        setattr(torch.accelerator.memory, name, getattr(torch_cuda_memory, name))
    torch.accelerator.synchronize = _accelerator_synchronize
    torch.backends.cudnn.is_acceptable = _cudnn_accepts


def _cudnn_accepts(tensor: torch.Tensor) -> bool:
    """No: a torch that is built for CUDA has cuDNN here, but its tensors are the workers'."""
    return False


def _name() -> str:
    from moai.platform import log

    return log.display_name()


_REPLACED = (
    *("is_available", "device_count", "current_device", "is_initialized", "init", "_lazy_init", "_is_in_bad_fork"),
    *(
        "set_device",
        "_exchange_device",
        "_maybe_exchange_device",
        "get_device_name",
        "get_device_properties",
        "get_device_capability",
    ),
    *("is_bf16_supported", "get_amp_supported_dtype", "get_arch_list", "can_device_access_peer"),
    *("synchronize", "ipc_collect", "get_rng_state", "set_rng_state", "get_rng_state_all", "set_rng_state_all"),
    *("manual_seed", "manual_seed_all", "seed", "seed_all", "initial_seed"),
)
