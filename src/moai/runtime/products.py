"""Matrix products of float32 on a CPU: two libraries have them, and which is faster depends on the machine.

PyTorch asks BLAS (MKL, as a rule). oneDNN takes the same factors if the first one is dense, and is some 7 % faster on
processors of AMD. In: how the tensors of a product lie. Out: whether oneDNN is worth it here. Both compute in float32;
their sums are in another order.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import torch

from moai.graph.step_graph import Ref
from moai.lower.program import Instruction

# Below so many multiplications, what a call costs beside them decides.
_LEAST_WORK = 1 << 22
# How much faster oneDNN has to be: less than that may be chance.
_MARGIN = 0.98
_ROUNDS, _SECONDS = 5, 0.1
# The longest dim that is tried out: what is larger behaves the same, and memory may be scarce.
_LONGEST = 2048


def is_product(instruction: Instruction) -> bool:
    """Whether the instruction is a plain `mm`, or `addmm`, of different tensors."""
    n = {"aten.mm.default": 2, "aten.addmm.default": 3}.get(instruction.op)
    tensors = {a.id for a in instruction.args if isinstance(a, Ref)}
    return not instruction.kwargs and len(instruction.args) == len(tensors) == n


def is_for_onednn(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether oneDNN can have the product of `tensors` ([bias,] factor, factor), and may be worth trying."""
    *bias, a, b = tensors
    return (
        torch.backends.mkldnn.is_available()
        and all(x.device.type == "cpu" and x.dtype == torch.float32 for x in tensors)
        and all(x.shape == b.shape[1:] and x.is_contiguous() for x in bias)
        and a.is_contiguous()
        and (b.is_contiguous() or b.t().is_contiguous())
        and a.numel() * b.shape[1] >= _LEAST_WORK
    )


def by_onednn(inputs: list[torch.Tensor]) -> tuple[torch.Tensor]:
    """The product of [bias,] factor, factor. Empties `inputs`."""
    *bias, a, b = inputs
    inputs.clear()
    return (torch.ops.mkldnn._linear_pointwise.default(a, b.t(), bias[0] if bias else None, "none", [], ""),)


def onednn_is_faster(sizes: tuple[int, ...], transposed: bool) -> bool:
    """Whether [n, k] @ [k, m], of `sizes` n, k, m, takes oneDNN less time: tries it. `transposed`: the second factor
    lies as [m, k]."""
    n, k, m = (min(length, _LONGEST) for length in sizes)
    a, b = torch.ones(n, k), torch.ones(m, k).t() if transposed else torch.ones(k, m)
    onednn, blas = _least_seconds(lambda: by_onednn([a, b]), lambda: torch.mm(a, b))
    return onednn < _MARGIN * blas


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
