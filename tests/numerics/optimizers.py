"""A plain single-device script: trains one small model in fp64 in the ways that scripts do, prints losses as JSON.

Run with a device and the names of cases.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator

import torch
from torch import nn

from benchmarks.numerics.models import IGNORED, MODELS

STEPS, BATCH, SEQ, VOCABULARY = 5, 7, 12, 96

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "single": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=False),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-1, momentum=0.9),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
}


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Tokens, mask and labels of a step; labels are ignored unevenly."""
    generator = torch.Generator().manual_seed(1)
    for step in range(STEPS):
        tokens = torch.randint(0, VOCABULARY, (BATCH, SEQ), generator=generator)
        mask = torch.ones_like(tokens)
        mask[0, :3] = 0
        labels = tokens.masked_fill(mask == 0, IGNORED)
        labels[0, : step % SEQ] = IGNORED
        labels[2] = IGNORED
        labels[5, 3:] = IGNORED
        yield tokens, mask, labels


def train(case: str, device: str) -> list[float]:
    """The losses of a case: optimizer[.extra...] with extras accumulate (over parts of the batch), clip, and twice
    (two optimizers, one model)."""
    name, *extras = case.split(".")
    torch.manual_seed(0)
    plain = MODELS["plain"]
    model = plain.make(2).double().to(device).train()
    parameters = list(model.parameters())
    if "twice" in extras:
        optimizers = [OPTIMIZERS[name](parameters[::2]), OPTIMIZERS["sgd"](parameters[1::2])]
    else:
        optimizers = [OPTIMIZERS[name](parameters)]
    schedule = torch.optim.lr_scheduler.LinearLR(optimizers[0], 0.1, 1.0, STEPS)
    losses = []
    for batch in batches():
        parts = [slice(0, 3), slice(3, BATCH)] if "accumulate" in extras else [slice(None)]
        total = torch.zeros((), device=device, dtype=torch.float64)
        for part in parts:
            loss = plain.loss(model, *(x[part].to(device) for x in batch)) / len(parts)
            loss.backward()
            total = total + loss.detach()
        if "clip" in extras:
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        for one in optimizers:
            one.step()
            one.zero_grad()
        schedule.step()
        losses.append(total.item())
    return losses


if __name__ == "__main__":
    torch.set_num_threads(1)
    device, *cases = sys.argv[1:]
    print(json.dumps({case: train(case, device) for case in cases}))
