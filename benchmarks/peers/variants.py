"""The ways to train that are compared.

All are scripts that someone would write. What differs is how the model is spread, the share of the batch that a process
is given, the implementation of AdamW, and whether torch.compile is used. Ours is the script of `plain` on "cuda", and
nothing but the environment differs between its variants.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from benchmarks.peers import data_parallel, pipelined, sharded, tensor_parallel


def in_one_pass(model: Any, tokens: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Forward and backward pass over the whole of a process's batch; its loss."""
    loss: torch.Tensor = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    return loss


@dataclass(frozen=True, slots=True)
class Variant:
    """A way to train.

    `spread` turns the model of one process into that of a rank; None where one process trains alone. Ranks share the
    batch, or each is given the `whole_batch`. `passes` runs forward and backward pass and returns the loss. `fused`
    chooses AdamW's implementation. `plan` and `compiled` are what the user says to this project; a variant with a plan
    is ours, and its script's device is "cuda".
    """

    spread: Callable[[nn.Module], nn.Module] | None = None
    whole_batch: bool = False
    passes: Callable[[nn.Module, torch.Tensor, torch.Tensor], torch.Tensor] = in_one_pass
    fused: bool = True
    plan: str | None = None
    compiled: bool = False

    @property
    def environment(self) -> dict[str, str]:
        """What the user of ours sets."""
        return {"MOAI_PLAN": self.plan, "MOAI_COMPILE": "always" if self.compiled else "never"} if self.plan else {}


_SHARDED = "dp=2,distribute_param=true"
_SHARDED_LOW = f"{_SHARDED},distribute_low_prec_param=true"

VARIANTS = {
    # One process, the whole batch, as many threads as the devices of the others have together.
    "plain": Variant(),
    "ddp_foreach": Variant(DistributedDataParallel, fused=False),
    "ddp_fused": Variant(DistributedDataParallel),
    "ddp_compiled": Variant(data_parallel.compiled),
    "ddp_layers_compiled": Variant(data_parallel.compiled_by_layer),
    "ddp_parts": Variant(DistributedDataParallel, passes=data_parallel.in_parts),
    "ddp_checkpointed": Variant(data_parallel.checkpointed),
    "fsdp2": Variant(sharded.gathered_twice),
    "fsdp2_once": Variant(sharded.gathered_once),
    "fsdp2_layers_compiled": Variant(sharded.compiled_by_layer),
    "tp": Variant(tensor_parallel.whole_residuals, whole_batch=True, passes=tensor_parallel.whole_loss),
    "tp_sequence": Variant(tensor_parallel.split_residuals, whole_batch=True, passes=tensor_parallel.split_loss),
    "pipelining_1f1b": Variant(pipelined.in_turns, whole_batch=True, passes=pipelined.in_parts),
    "pipelining_gpipe": Variant(pipelined.forwards_first, whole_batch=True, passes=pipelined.in_parts),
    "moai": Variant(plan="dp=2"),
    "moai_foreach": Variant(plan="dp=2", fused=False),
    "moai_compiled": Variant(plan="dp=2", compiled=True),
    "moai_sharded": Variant(plan=_SHARDED),
    "moai_sharded_compiled": Variant(plan=_SHARDED, compiled=True),
    "moai_sharded_low": Variant(plan=_SHARDED_LOW),
    "moai_sharded_low_compiled": Variant(plan=_SHARDED_LOW, compiled=True),
    "moai_tp": Variant(plan="tp=2,dp=1"),
    "moai_tp_compiled": Variant(plan="tp=2,dp=1", compiled=True),
    "moai_micro": Variant(plan=f"dp=2,micro={data_parallel.PARTS}"),
    "moai_micro_compiled": Variant(plan=f"dp=2,micro={data_parallel.PARTS}", compiled=True),
    "moai_1f1b": Variant(plan=f"pp=2,dp=1,micro={pipelined.PARTS}"),
    "moai_gpipe": Variant(plan=f"pp=2,dp=1,micro={pipelined.PARTS},schedule=gpipe"),
    "moai_recompute": Variant(plan="dp=2,recompute=full"),
    "moai_recompute_compiled": Variant(plan="dp=2,recompute=full", compiled=True),
}

EXACT = "plain"


def is_ours(name: str) -> bool:
    """Whether a variant is this project's."""
    return VARIANTS[name].plan is not None


# What is measured side by side, by the name it is asked for. Each begins with the training whose losses are exact.
COMPARISONS = {
    "dp": (EXACT, "ddp_foreach", "ddp_fused", "moai", "moai_foreach"),
    "compiled": (EXACT, "ddp_fused", "ddp_compiled", "ddp_layers_compiled", "moai_compiled"),
    "sharded": (
        *(EXACT, "fsdp2", "fsdp2_once", "fsdp2_layers_compiled"),
        *("moai_sharded", "moai_sharded_compiled", "moai_sharded_low", "moai_sharded_low_compiled"),
    ),
    "tp": (EXACT, "tp", "tp_sequence", "moai_tp", "moai_tp_compiled"),
    "micro": (EXACT, "ddp_fused", "ddp_parts", "moai_micro", "moai_micro_compiled"),
    "pipeline": (EXACT, "pipelining_1f1b", "pipelining_gpipe", "moai_1f1b", "moai_gpipe"),
    "recompute": (EXACT, "ddp_fused", "ddp_checkpointed", "moai_recompute", "moai_recompute_compiled"),
}
