"""Tensor parallelism as PyTorch has it: `parallelize_module` in Megatron's pattern, `loss_parallel` for the loss.

In: the model of one process. Out: that of a rank, which is given the whole batch. Or: such a model and the batch in,
its loss out.

Attention's and the MLP's inputs become DTensors before their projections, so that the gradients of what projections
share are summed once and not once a projection. There is no compiled variant: with torch 2.13, the backward pass of
compiled layers between DTensors fails on a gradient that is not one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    ParallelStyle,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)


def whole_residuals(model: Any) -> nn.Module:
    """Between the layers' matrices, activations are whole on every rank: an all-reduce after each pair of matrices."""
    return _parallelize(model, Replicate(), {})


def split_residuals(model: Any) -> nn.Module:
    """Between the layers' matrices, each rank holds a part of the sequence: reduce-scatter and all-gather instead.

    Positions and mask are said by `split_loss`, for the model would take them from the part's length.
    """
    norms: dict[str, ParallelStyle] = {
        "model.norm": SequenceParallel(),
        "model.layers.*.input_layernorm": SequenceParallel(),
        "model.layers.*.post_attention_layernorm": SequenceParallel(),
    }
    return _parallelize(model, Shard(1), norms)


def whole_loss(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Forward and backward pass of `whole_residuals`."""
    return _loss(model, input_ids=tokens, labels=labels)


def split_loss(model: nn.Module, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Forward and backward pass of `split_residuals`."""
    positions = torch.arange(tokens.shape[1])[None]
    causal = {"full_attention": None}
    return _loss(model, input_ids=tokens, labels=labels, position_ids=positions, attention_mask=causal)


def _parallelize(model: Any, between: Replicate | Shard, norms: dict[str, ParallelStyle]) -> nn.Module:
    """`between` says how activations lie between the layers' matrices."""
    whole = Replicate()
    attention = PrepareModuleInput(
        input_kwarg_layouts={"hidden_states": between}, desired_input_kwarg_layouts={"hidden_states": whole}
    )
    mlp = PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(whole,))
    plan: dict[str, ParallelStyle] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=whole, output_layouts=between),
        **norms,
        "model.layers.*.self_attn": attention,
        "model.layers.*.mlp": mlp,
        "lm_head": ColwiseParallel(input_layouts=between, output_layouts=Shard(-1), use_local_output=False),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel(output_layouts=between)
    parallelize_module(model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    # Parallelizing has made two parameters of the one that embedding and head share; both are split by vocabulary.
    model.lm_head.weight = model.model.embed_tokens.weight
    return model


def _loss(model: nn.Module, **inputs: Any) -> torch.Tensor:
    with loss_parallel():
        loss = model(**inputs).loss
        loss.backward()
    assert isinstance(loss, DTensor)
    return loss.full_tensor()
