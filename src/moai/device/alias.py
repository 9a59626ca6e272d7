"""Turning the accelerator into this process's "cuda".

In: `turn_on()`. Out: torch in which "cuda" is the accelerator: `torch.device`, `torch.cuda`, `torch.Generator`, the
tensor methods that take a device, autocast, saving and loading. It costs about 30 ms, most of it
imports; the operators' kernels are registered when the device is used for the first time (`torch.cuda._lazy_init`).

Types are changed in place and functions are replaced under their own names, so code that imported a type earlier sees
the accelerator too; code that imported a replaced *function* earlier (`from torch import get_autocast_dtype`) does
not.

What a script can still notice:

* `torch.version.cuda` is None (and `torch.version.hip`): code that reads the CUDA version there takes it for a CPU
  build. Known to look: `torch.utils.cpp_extension`, bitsandbytes, flash-attn, TF32 checks of transformers.
* `torch._C._cuda_*`, `torch.cuda.nccl`, CUDA graphs, `torch.cuda.cudart()`, NVML readings (`utilization`,
  `temperature`) are absent, and `torch.backends.cudnn.is_available()` is False.
* Messages written by C++ say "moai:0", e.g. "found at least two devices, moai:0 and cpu".
  `torch.utils.rename_privateuse1_backend` cannot take the name "cuda".
* A sparse tensor that is moved to the accelerator becomes a dense one.
* `pin_memory` is accepted everywhere and pins nothing; `Tensor.is_pinned()` is always False.
* `torch.zeros` and the other factories are Python functions. A `TorchFunctionMode` gets the built-in ones, so
  `func is torch.zeros` is False there.
* `torch.Stream("cuda")`, `torch.Event("cuda")` and `torch.UntypedStorage(n, device="cuda")` are refused by C++;
  `torch.cuda.Stream`, `torch.cuda.Event` and storages of tensors are what works.
* A generator of the accelerator that is passed to an operator on CPU tensors is not refused.
* `x.data = y` across devices, and so `Module.cuda()`, exchanges tensors: it fails for a parameter that a weak
  reference points to, or that a live autograd graph or a TorchScript module holds.
* Random numbers are reproducible for a seed but are not those of a GPU.
* `torch.compile` compiles nothing in this process: what it returns runs operator by operator.
* A process group of "nccl" has one process, DataParallel and DistributedDataParallel call their module.
"""

from __future__ import annotations

import logging
import os

import torch

_on = False


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    """What C++ asks about the device."""

    def is_available(self) -> bool:
        return True

    def has_primary_context(self, device_index: int) -> bool:
        return True

    def is_built(self) -> bool:
        return True


def is_on() -> bool:
    """Whether "cuda" is the accelerator in this process."""
    return _on


def turn_on() -> bool:
    """Makes "cuda" the accelerator, once for the process. Returns whether it is.

    It is not where the user has set MOAI_CUDA=0. Raises RuntimeError if torch or the interpreter is not as expected.
    """
    global _on
    if not _on and os.environ.get("MOAI_CUDA") == "0":
        logging.getLogger("moai").warning("MOAI_CUDA=0 is set: this program runs without the accelerator.")
        return False
    if not _on:
        _install()
        _on = True
    return True


def _install() -> None:
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    from moai.device import (
        autocast,
        checkpoints,
        compiling,
        factories,
        generation,
        generator,
        legacy_types,
        modules,
        parallel,
        process_group,
        serialization,
        tensors,
        torch_cuda,
        torch_device,
        trainer,
    )

    _setup_privateuseone_for_python_backend(torch_device.NAME, torch.cuda, _Hooks())
    torch_device.install()
    generator.install()
    torch_cuda.install()
    tensors.install()
    factories.install()
    legacy_types.install()
    modules.install()
    autocast.rename()
    serialization.install()
    checkpoints.install()
    compiling.install()
    generation.install()
    parallel.install()
    process_group.install()
    trainer.install()
