"""Matrix products of float32 on a CPU: two libraries have them, and which is faster depends on the machine.

PyTorch asks BLAS (MKL, as a rule). oneDNN takes the same factors if the first one is dense, and is some 7 % faster on
processors of AMD. In: the tensors of a product. Out: oneDNN's product. Both compute in float32; their sums are in
another order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from moai.graph.step_graph import Ref
from moai.lower.program import Instruction
from moai.runtime.layout import Layout

# Below so many multiplications, what a call costs beside them decides.
_LEAST_WORK = 1 << 22
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


def examples(layouts: Sequence[Layout]) -> list[torch.Tensor]:
    """Tensors that lie like these, none of them very large."""
    *bias, a, b = layouts
    n, k, m = (min(length, _LONGEST) for length in (*a.shape, b.shape[1]))
    second = torch.ones(k, m) if b.stride[-1] == 1 else torch.ones(m, k).t()
    return [*(torch.ones(m) for _ in bias), torch.ones(n, k), second]
