"""What is predicted of a step under a plan: seconds by part, memory, and what each stage has of both.

In: made by `cost`. Out: read by the search and printed by the commands.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from moai.plan.work import Memory


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of a step; their sum is the step. `host`: what waiting for calls adds; `tp_exposed`: messages within
    layers that computing waits for; `dp_exposed`: those of gradients and of sharded states; `pp_exposed`: what waiting
    for those between stages adds; `slowdown`: what computing loses to messages beside it; `bubble`: waiting for other
    stages."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0
    optimizer: float = 0.0
    host: float = 0.0
    tp_exposed: float = 0.0
    dp_exposed: float = 0.0
    pp_exposed: float = 0.0
    slowdown: float = 0.0
    bubble: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, f.name) for f in fields(self))


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage. Seconds of a micro-batch's forward and backward, of the part of the backward that no other
    stage waits for, and of what is done once a step. `memory`: of a device that has it, with its other stages."""

    layers: int
    forward_s: float
    backward_s: float
    weights_s: float
    once_s: float
    memory: Memory


@dataclass(frozen=True, slots=True)
class Prediction:
    """A step's time and its parts; the memory of the device that holds the most; the stages, first one first, and how
    much later what one makes is with the next (`hop_s`)."""

    step_s: float
    parts: Parts
    memory: Memory
    stages: tuple[Stage, ...]
    hop_s: float = 0.0
