"""Whether a device computes matrix products faster in bf16 than in fp32.

In: a device. Out: yes or no, by what its processor has instructions for and not by a clock: the numbers of a program
must not depend on how busy the machine is.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache

from moai.platform.device import Device
from moai.platform.pool import visible_names

_CPU_FEATURES = ("amx_bf16", "avx512_bf16")  # with the second, twice the speed of fp32, casts included
_LEAST_COMPUTE_CAPABILITY = 8  # NVIDIA's Ampere, the first with bf16 in its tensor cores


def bf16_is_faster(device: Device) -> bool:
    """See the module docstring. A GPU that the driver does not tell about is taken for an old one."""
    return _cpu() if device.kind == "cpu" else _cuda(device.index)


@cache
def _cpu() -> bool:
    import torch

    features = torch.cpu.get_capabilities()
    return any(features.get(name, False) for name in _CPU_FEATURES)


@cache
def _cuda(index: int) -> bool:
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return False
    if nvml.nvmlInit_v2() != 0:
        return False
    try:
        return _compute_capability(nvml, index) >= _LEAST_COMPUTE_CAPABILITY
    finally:
        nvml.nvmlShutdown()


def _compute_capability(nvml: ctypes.CDLL, index: int) -> int:
    """The major one of the visible GPU number `index`; 0 where it is not known."""
    count, handle, major, minor = ctypes.c_uint(), ctypes.c_void_p(), ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
        return 0
    names = visible_names(os.environ.get("CUDA_VISIBLE_DEVICES"), count.value)
    if index >= len(names):
        return 0
    name = names[index]
    if name.isdigit():
        status = nvml.nvmlDeviceGetHandleByIndex_v2(int(name), ctypes.byref(handle))
    else:
        status = nvml.nvmlDeviceGetHandleByUUID(name.encode(), ctypes.byref(handle))
    if status != 0 or nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) != 0:
        return 0
    return major.value
