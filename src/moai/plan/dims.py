"""Dims: a transformer that is known by its sizes only, how it is laid out, and how a framework goes about it.

In: what someone knows of a run. Out: read by `plan.transformer`, which writes the run's work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NARROW = ("fp8", "fp4")
Recomputation = Literal["none", "attention", "operators", "full"]
Sharding = Literal["none", "states", "gradients", "full"]


@dataclass(frozen=True, slots=True)
class Model:
    """Dims of a decoder. `gated`: the feed-forward part has three matrices and not two; `tied`: the embedding is the
    head; `adapters`: which matrices are frozen and have trained adapters beside them, "" where all are trained; `head`:
    entries of a head, 0 where the heads share the hidden ones."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    seq: int
    gated: bool = True
    tied: bool = False
    adapters: Literal["", "queries", "all"] = ""
    head: int = 0

    @property
    def queries(self) -> float:
        """Entries of a token's queries."""
        return self.head * self.heads or self.hidden

    @property
    def kv(self) -> float:
        """Entries of a token's keys, and of its values."""
        return self.queries * self.kv_heads / self.heads

    @property
    def layer_parameters(self) -> float:
        feeding = (3 if self.gated else 2) * self.ffn
        return self.hidden * (2 * self.queries + 2 * self.kv + feeding + 2)

    @property
    def table_parameters(self) -> float:
        """Of the embedding, or of the head."""
        return self.hidden * self.vocab

    @property
    def parameters(self) -> float:
        return self.layers * self.layer_parameters + (1 if self.tied else 2) * self.table_parameters


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the axes; samples and number of the micro-batches of a device; precision of the layers' products."""

    dp: int = 1
    tp: int = 1
    pp: int = 1
    cp: int = 1
    samples: float = 1
    micro: int = 1
    precision: str = "bf16"
    recompute: Recomputation = "none"
    sharding: Sharding = "none"

    @property
    def half(self) -> str:
        """The precision of what is too delicate for the narrow ones."""
        return "bf16" if self.precision in NARROW else self.precision


@dataclass(frozen=True, slots=True)
class Stack:
    """How a framework goes about a transformer. What is of the framework, and not of the device, stands here.

    flash: attention is one kernel, and not products with a softmax between; attention_excess: its FLOPs over those
    that are needed. fused: what lies between the products is few kernels; entry_bytes: of an entry that these
    read or write.
    calls_between: of the host, for what lies between two products, and twice as many for its backward; calls_loss: for
    the loss, and again for its backward.
    sequence_parallel: between the products of tp, tokens are shared. tp_overlap: which of its messages are cut up and
    sent beside the products. gathers_again: what tp gathers for a product is not kept, but gathered for the backward.
    dp_overlap: gradients and weights are sent beside the backward and the forward. gathered_once: of fully sharded
    weights the layers are gathered once a step, and gradients summed once.
    weight_bytes: of a parameter as it is kept; gradient_bytes: of one as it is summed; accumulates: gradients are added
    to those of earlier micro-batches. state_bytes: of a parameter's optimizer states and its precise copy.
    logit_bytes: held for an entry of the logits, and moved for it on each way. casts: bytes moved for an entry of a
    product's operands, to make them narrow; keeps_narrow: they are kept so for the backward.
    """

    flash: bool = True
    fused: bool = True
    entry_bytes: float = 2
    calls_between: float = 2
    calls_loss: float = 8
    sequence_parallel: bool = True
    tp_overlap: Literal["none", "backward", "all"] = "backward"
    dp_overlap: bool = True
    gathered_once: bool = False
    weight_bytes: float = 2
    gradient_bytes: float = 4
    accumulates: bool = True
    state_bytes: float = 12
    logit_bytes: float = 6
    casts: float = 0
    keeps_narrow: bool = False
    gathers_again: bool = True
    attention_excess: float = 1
