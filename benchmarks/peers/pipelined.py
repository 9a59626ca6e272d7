"""A pipeline as PyTorch has it: a model that was split by hand, and a schedule of `torch.distributed.pipelining`.

In: the model of one process. Out: a rank's part of it, with as many layers as every other rank has. Or: such a part and
the batch in, the step's loss out.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle

PARTS = 8  # micro-batches of a step


class Part(nn.Module):
    """A rank's layers; the first one's embeds tokens, and the last one's has the head."""

    def __init__(self, model: Any, schedule: type[PipelineScheduleSingle]) -> None:
        super().__init__()
        rank, ranks = dist.get_rank(), dist.get_world_size()
        layers = model.model.layers
        if len(layers) % ranks:
            raise ValueError(f"{len(layers)} layers cannot be split evenly among {ranks} ranks.")
        each = len(layers) // ranks
        self.layers = nn.ModuleList(layers[rank * each : (rank + 1) * each])
        self.rotary = model.model.rotary_emb
        self.is_last = rank == ranks - 1
        self.embedding = model.model.embed_tokens if rank == 0 else None
        self.norm, self.head = (model.model.norm, model.lm_head) if self.is_last else (None, None)
        self.pipeline = schedule(PipelineStage(self, rank, ranks, torch.device("cpu")), PARTS, loss_fn=_loss)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = x if self.embedding is None else self.embedding(x)
        positions = torch.arange(h.shape[1])[None]
        rotary = self.rotary(h, positions)
        for layer in self.layers:
            h = layer(h, attention_mask=None, position_ids=positions, position_embeddings=rotary)
        return h if self.norm is None else self.head(self.norm(h))


def in_turns(model: Any) -> nn.Module:
    """1F1B."""
    return Part(model, Schedule1F1B)


def forwards_first(model: Any) -> nn.Module:
    """GPipe."""
    return Part(model, ScheduleGPipe)


def in_parts(part: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Forward and backward of all micro-batches; the mean of their losses, which the last rank tells the others."""
    losses: list[torch.Tensor] = []
    given = (tokens,) if part.embedding is not None else ()
    if part.is_last:
        part.pipeline.step(*given, target=labels, losses=losses)
        loss = torch.stack(losses).detach().mean()
    else:
        part.pipeline.step(*given)
        loss = torch.zeros(())
    dist.broadcast(loss, dist.get_world_size() - 1)
    return loss


def _loss(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
