"""The ways to train that are compared, and the process that trains in one of them.

In: a variant's name, sizes, this process's part. Out, through the pipe: "ready", then, for each number of steps that it
is told to run, the loss of the last of them.

All are scripts that someone would write, without torch.compile; what differs is how the model is spread, the
implementation of AdamW, and the share of the batch that a process is given:

- `plain`: one process, the whole batch, as many threads as the devices of the others have together.
- `ddp_foreach`, `ddp_fused`: DistributedDataParallel, with AdamW's default and with its fused implementation.
- `fsdp2`: `fully_shard` on each layer and on the model, with fused AdamW.
- `moai`, `moai_foreach`: the script of `plain` on "cuda", with fused and with default AdamW.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from benchmarks.training import Corpus, Sizes

LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.01
_GROUP_TIMEOUT = timedelta(seconds=120)


def _sharded(model: Any) -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@dataclass(frozen=True, slots=True)
class Variant:
    """`spread` turns the model of one process into that of a rank; None where one process trains alone. `fused` chooses
    AdamW's implementation, `device` is where the script puts its tensors."""

    fused: bool
    spread: Callable[[nn.Module], nn.Module] | None = None
    device: str = "cpu"


VARIANTS = {
    "plain": Variant(fused=True),
    "ddp_foreach": Variant(fused=False, spread=DistributedDataParallel),
    "ddp_fused": Variant(fused=True, spread=DistributedDataParallel),
    "fsdp2": Variant(fused=True, spread=_sharded),
    "moai": Variant(fused=True, device="cuda"),
    "moai_foreach": Variant(fused=False, device="cuda"),
}


def train(
    connection: Connection,
    variant: str,
    sizes: dict[str, int],
    rank: int,
    ranks: int,
    threads: int,
    cores: Sequence[int],
    meeting: str,
) -> None:
    """The child's side. `meeting` is a file that all ranks of a variant can reach, `cores` are those to compute on."""
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
        _serve(connection, how, Sizes(**sizes), rank, ranks)
    finally:
        if how.spread:
            dist.destroy_process_group()


def _serve(connection: Connection, how: Variant, sizes: Sizes, rank: int, ranks: int) -> None:
    corpus = Corpus(sizes)
    model: nn.Module = sizes.model()
    model.to(how.device)
    if how.spread:
        model = how.spread(model)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True if how.fused else None
    )

    def step(index: int) -> torch.Tensor:
        tokens, labels = (x.chunk(ranks)[rank].to(how.device) for x in corpus.batch(index))
        loss: torch.Tensor = model(input_ids=tokens, labels=labels).loss
        loss.backward()
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
