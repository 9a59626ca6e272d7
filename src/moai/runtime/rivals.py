"""Rivals: another way to compute what one large kernel does, which may be the faster one on this machine.

In: an instruction; tensors, or how they lie. Out: its rival, if there is one, and whether that takes less time.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from moai.lower.program import Instruction
from moai.runtime import attention, products
from moai.runtime.layout import Layout

# How much faster it has to be: less than that may be chance.
_MARGIN = 0.98
_ROUNDS, _SECONDS = 5, 0.1


@dataclass(frozen=True, slots=True)
class Rival:
    """`function` gives the instruction's results for a list of its tensors, which it empties. `takes` says of tensors
    whether it can have them and may be worth trying; on `examples` of such, large enough to tell, it is tried."""

    name: str
    function: Callable[[list[torch.Tensor]], Sequence[torch.Tensor]]
    takes: Callable[[Sequence[torch.Tensor]], bool]
    examples: Callable[[Sequence[Layout]], list[torch.Tensor]]


def rival(instruction: Instruction) -> Rival | None:
    """The rival of the kernel that the instruction calls."""
    if products.is_product(instruction):
        return Rival("oneDNN", products.by_onednn, products.is_for_onednn, products.examples)
    if attention.is_causal_backward(instruction):
        function = partial(attention.by_products, scale=attention.scale(instruction))
        return Rival("products", function, attention.is_for_products, attention.examples)
    return None


def is_faster(rival: Rival, plain: Callable[[Sequence[torch.Tensor]], Any], layouts: Sequence[Layout]) -> bool:
    """Whether the rival of `plain` takes less time for tensors like these: tries it."""
    tensors = rival.examples(layouts)
    other, known = _least_seconds(lambda: rival.function(list(tensors)), lambda: plain(tensors))
    return other < _MARGIN * known


def _least_seconds(*functions: Callable[[], object]) -> list[float]:
    """Of this thread's processor, for several calls each, in turns: whatever else the machine does only adds to it."""
    least = [math.inf] * len(functions)
    begin = time.thread_time()
    rounds = 0
    while rounds < _ROUNDS or time.thread_time() - begin < _SECONDS:
        for k, function in enumerate(functions):
            start = time.thread_time()
            function()
            least[k] = min(least[k], time.thread_time() - start)
        rounds += 1
    return least
