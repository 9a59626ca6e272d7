"""The wrappers of `torch.nn.parallel` around a module of the accelerator.

In: DataParallel and DistributedDataParallel. Out: the same classes, for the one device there is: they call their
module. It is the accelerator that spreads a step over its devices.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import distributed

from moai.device.process_group import ONE_PROCESS


def install() -> None:
    """Changes the classes of `torch.nn.parallel` in place. Call once."""
    _neutral_data_parallel(torch.nn.DataParallel)
    if distributed.is_available():
        _neutral_distributed(torch.nn.parallel.DistributedDataParallel)


def _is_ours(module: torch.nn.Module) -> bool:
    """Whether a module's parameters are the accelerator's."""
    return any(p.device.type not in ("cpu", "meta") for p in module.parameters())


def _neutral_data_parallel(kind: Any) -> None:
    forward = kind.forward

    def call_module(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        if not _is_ours(self.module):
            return forward(self, *inputs, **kwargs)
        return self.module(*_on_accelerator(inputs), **_on_accelerator(kwargs))

    kind.forward = call_module


def _on_accelerator(value: Any) -> Any:
    """Tensors anywhere in arguments, moved as DataParallel moves them."""
    if isinstance(value, torch.Tensor):
        return value.to("cuda")
    if isinstance(value, tuple):
        moved = [_on_accelerator(v) for v in value]
        return type(value)(*moved) if hasattr(value, "_fields") else type(value)(moved)
    if isinstance(value, list):
        return [_on_accelerator(v) for v in value]
    if isinstance(value, dict):
        return type(value)((k, _on_accelerator(v)) for k, v in value.items())
    return value


def _neutral_distributed(kind: Any) -> None:
    """DDP's buckets would tear a step's gradients apart for a sum over one process: of its methods only those are left
    that a script calls."""
    original = {name: getattr(kind, name) for name in ("__init__", "forward", "no_sync", "join", "register_comm_hook")}

    def init(self: Any, module: torch.nn.Module, *args: Any, **kwargs: Any) -> None:
        if not _is_ours(module):
            original["__init__"](self, module, *args, **kwargs)
            return
        group = kwargs.get("process_group") or distributed.distributed_c10d._get_default_group()
        if group.size() > 1:
            raise RuntimeError(f"DistributedDataParallel over {group.size()} processes. {ONE_PROCESS}")
        torch.nn.Module.__init__(self)
        self.module = module
        self.process_group, self.device = group, next(module.parameters()).device
        self.device_ids, self.output_device, self.dim = [0], 0, 0
        self.device_type, self.is_multi_device_module = "cuda", False
        self.require_backward_grad_sync, self.static_graph = True, False
        self.find_unused_parameters = kwargs.get("find_unused_parameters", False)

    def call_module(self: Any, *inputs: Any, **kwargs: Any) -> Any:
        if not _is_ours(self.module):
            return original["forward"](self, *inputs, **kwargs)
        return self.module(*_on_accelerator(inputs), **_on_accelerator(kwargs))

    def nothing(name: str, result: Any) -> Any:
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            return result() if _is_ours(self.module) else original[name](self, *args, **kwargs)

        return method

    kind.__init__ = init
    kind.forward = call_module
    kind.no_sync = nothing("no_sync", nullcontext)
    kind.join = nothing("join", nullcontext)
    kind.register_comm_hook = nothing("register_comm_hook", lambda: None)
