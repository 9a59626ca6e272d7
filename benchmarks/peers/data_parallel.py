"""Data parallelism as PyTorch has it: every rank holds the model whole, and gradients are averaged over the ranks.

In: the model of one process. Out: that of a rank. Or: a model and the rank's batch in, its loss out.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

PARTS = 4  # micro-batches of a step


def compiled(model: nn.Module) -> Any:
    """DDP, compiled as a whole; Dynamo cuts the graph where gradients are to be sent."""
    return torch.compile(DistributedDataParallel(model))


def compiled_by_layer(model: Any) -> nn.Module:
    """DDP over layers that are each compiled: they are alike, so one compilation serves all."""
    compile_layers(model)
    return DistributedDataParallel(model)


def compile_layers(model: Any) -> None:
    """Compile each layer of the model by itself, in place."""
    layers = model.model.layers
    for index, layer in enumerate(layers):
        layers[index] = torch.compile(layer)


def checkpointed(model: Any) -> nn.Module:
    """DDP over layers that keep only their inputs and are computed again in the backward pass."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return DistributedDataParallel(model)


def in_parts(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Gradient accumulation: `PARTS` passes, gradients averaged over the ranks in the last; the mean of their losses.

    The mean of the parts' means, as in any script that divides by the number of parts.
    """
    losses = []
    batches = list(zip(tokens.chunk(PARTS), labels.chunk(PARTS), strict=True))
    for index, (part, wanted) in enumerate(batches):
        last = index == len(batches) - 1
        with contextlib.nullcontext() if last else model.no_sync():
            loss = model(input_ids=part, labels=wanted).loss / len(batches)
            loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()
