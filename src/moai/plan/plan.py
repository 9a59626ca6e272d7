"""Plan: how one StepGraph is spread over an accelerator's devices.

In: chosen by the session, or forced by the user. Out: read by `lower`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Literal

from moai.graph.placement import STAGES, TIME, Mesh

Recompute = Literal["none", "default", "full"]
Precision = Literal["fp32", "bf16", "fp64"]
Schedule = Literal["1f1b", "gpipe", "zero_bubble", "interleaved"]

_LEVELS = {"none": "none(0)", "default": "default(1)", "full": "full(2)"}  # of recomputation, as the log names them


@dataclass(frozen=True, slots=True)
class Plan:
    """`dp` devices share the batch, each in `micro` parts one after another; `tp` devices share every layer's matrices;
    `pp` stages share the layers. dp * tp * pp devices in all.

    recompute: which activations the backward pass computes again ("default": some, "full": all but layers' inputs).
    distribute_param: parameters, gradients and optimizer states are sharded over dp (over groups of `shard` of its
    devices, if that is given); distribute_low_prec_param: what the layers compute with, too.
    precision: that of matrix products; None leaves the script's own.
    schedule: in which order a stage does the forwards and backwards of its micro-batches ("gpipe": all forwards first;
    "1f1b": in turns, as early as it can, so that fewer are under way; "zero_bubble": as that, with gradients of weights
    where it would wait; "interleaved": as 1f1b, with `chunks` stages a device, the first ones of all devices first).
    layers: how many of the model's layers each stage has (0 for one of them: those that the others leave); None: as
    many as make the stages take about equally long.
    """

    dp: int = 1
    tp: int = 1
    pp: int = 1
    micro: int = 1
    recompute: Recompute = "none"
    distribute_param: bool = False
    distribute_low_prec_param: bool = False
    precision: Precision | None = None
    shard: int | None = None
    schedule: Schedule = "1f1b"
    chunks: int = 2
    layers: tuple[int, ...] | None = None

    def __str__(self) -> str:
        """The text that `plan.parse` makes this plan of: dp, and what is not as usual."""
        chosen = [f.name for f in fields(self) if f.name == "dp" or getattr(self, f.name) != f.default]
        return ",".join(f"{key}={_text(getattr(self, key))}" for key in chosen)

    def line(self, batch: int = 0) -> str:
        """The plan as the log and the list of jobs show it. `batch`: samples of a step, where that is known."""
        parts = [
            *self._pipeline(batch),
            "No TP" if self.tp == 1 else f"tp : {self.tp}",
            f"dp : {self.dp}",
            *([f"num_micro_batches : {self.micro}"] if self.pp == 1 else []),
            f"recomputation : {_LEVELS[self.recompute]}",
            f"distribute_param : {_text(self.distribute_param)}",
            f"distribute_low_prec_param : {_text(self.distribute_low_prec_param)}",
        ]
        if self.precision is not None:
            parts.append(f"precision : {self.precision}")
        if self.shard is not None:
            parts.append(f"shard : {self.shard}")
        if self.schedule != "1f1b":
            parts.append(f"schedule : {self.schedule}")
        if self.schedule == "interleaved":
            parts.append(f"chunks : {self.chunks}")
        if self.layers is not None:
            parts.append(f"layers : {_text(self.layers)}")
        return ", ".join(parts)

    def _pipeline(self, batch: int) -> list[str]:
        if self.pp == 1:
            return ["No PP"]
        found = [f"num_stages : {self.pp}", f"num_micro_batches : {self.micro}"]
        return [*found, f"batch_per_device : {math.ceil(batch / (self.dp * self.micro))}"] if batch else found

    @property
    def n_devices(self) -> int:
        """How many devices the plan is for."""
        return self.dp * self.tp * self.pp

    @property
    def n_stages(self) -> int:
        """In how many parts the layers are cut: a device may have several."""
        return self.pp * self.chunks if self.schedule == "interleaved" else self.pp

    @property
    def batch_axes(self) -> tuple[str, ...]:
        """The mesh axes that share the batch, outermost first."""
        return tuple(name for name, _ in self.mesh.axes if name not in ("tp", STAGES))

    @property
    def splits_samples(self) -> bool:
        """Whether no device sees the whole batch at once."""
        return self.dp * self.micro > 1

    @property
    def shard_axis(self) -> str:
        """The mesh axis that sharded states are spread over."""
        return "dp" if self.shard in (None, self.dp) else "dp_shard"

    @property
    def mesh(self) -> Mesh:
        """Axes of one device are left out. Devices of one stage are numbered one after another."""
        if self.shard_axis == "dp":
            data = [("dp", self.dp)]
        else:
            assert self.shard is not None
            data = [("dp_replicate", self.dp // self.shard), ("dp_shard", self.shard)]
        axes = [(STAGES, self.pp), *data, ("tp", self.tp), (TIME, self.micro)]
        return Mesh(tuple((name, size) for name, size in axes if size > 1))


def _text(value: object) -> str:
    if isinstance(value, tuple):
        return "+".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
