"""The process that trains in one of the ways of `variants`.

In: a variant's name, sizes, this process's part. Out, through the pipe: "ready", then, for each number of steps that it
is told to run, the loss of the last of them.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor

from benchmarks.peers.variants import VARIANTS, Variant
from benchmarks.training import Corpus, Sizes

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
# A rank waits for another that compiles.
_GROUP_TIMEOUT = timedelta(minutes=10)


def train(
    connection: Connection,
    variant: str,
    sizes: dict[str, int],
    even: bool,
    rank: int,
    ranks: int,
    threads: int,
    cores: Sequence[int],
    meeting: str,
) -> None:
    """The child's side. `meeting` is a file that all ranks of a variant can reach, `cores` are those to compute on, and
    `even` is as in `Corpus`."""
    how = VARIANTS[variant]
    torch.set_num_threads(threads)
    if how.spread:
        dist.init_process_group(
            "gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks, timeout=_GROUP_TIMEOUT
        )
    if cores:
        # After the threads of the collectives were started, which thereby stay free to run elsewhere: as in a worker.
        os.sched_setaffinity(0, cores)
    try:
        share = (0, 1) if how.whole_batch else (rank, ranks)
        _serve(connection, how, Sizes(**sizes), even, share)
    finally:
        if how.spread:
            dist.destroy_process_group()


def _serve(connection: Connection, how: Variant, sizes: Sizes, even: bool, share: tuple[int, int]) -> None:
    """`share` is (which, of how many) equal parts of the batch."""
    corpus = Corpus(sizes, even)
    device = "cuda" if how.plan else "cpu"
    model: nn.Module = sizes.model()
    model.to(device)
    if how.spread:
        model = how.spread(model)
    optimizer = torch.optim.AdamW(
        _groups(model), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True if how.fused else None
    )
    which, parts = share

    def step(index: int) -> torch.Tensor:
        tokens, labels = (x.chunk(parts)[which].to(device) for x in corpus.batch(index))
        loss = how.passes(model, tokens, labels)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    connection.send("ready")
    done = 0
    while True:
        steps = connection.recv()
        for index in range(done, done + steps):
            loss = step(index)
        done += steps
        connection.send(loss.item())


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    """Parameters for an optimizer: fused implementations take DTensors or plain tensors, and not both at once."""
    parameters = list(model.parameters())
    kinds = ([p for p in parameters if isinstance(p, DTensor) is split] for split in (False, True))
    return [{"params": kind} for kind in kinds if kind]
