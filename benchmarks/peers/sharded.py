"""Sharded states as PyTorch has them: FSDP2, each layer a group of its own and what is left another.

In: the model of one process. Out: that of a rank.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from benchmarks.peers.data_parallel import compile_layers


def gathered_twice(model: nn.Module) -> nn.Module:
    """A layer's parameters are gathered for its forward pass, dropped, and gathered again for its backward pass."""
    return _shard(model, drop=True)


def gathered_once(model: nn.Module) -> nn.Module:
    """A layer's parameters are gathered for its forward pass and stay whole until its backward pass is over."""
    return _shard(model, drop=False)


def compiled_by_layer(model: nn.Module) -> nn.Module:
    """As `gathered_twice`, with every layer compiled by itself."""
    compile_layers(model)
    return _shard(model, drop=True)


def _shard(model: Any, drop: bool) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, reshard_after_forward=drop)
    return fully_shard(model, mesh=mesh, reshard_after_forward=drop)
