"""Scaled dot-product attention stays one node.

On a device registered from Python torch takes attention apart before the device sees it. This kernel sits above that,
at autograd's key: without dropout it records `moai.sdpa` with a backward formula of its own; with dropout, or where
the mask needs a gradient, it leaves the parts to torch.
"""

from __future__ import annotations

from typing import Any

import torch

import moai.graph.ops  # noqa: F401  (registers torch.ops.moai)
from moai.capture.operators import Operator
from moai.capture.recorder import Recorder

_libraries: list[torch.library.Library] = []


def install(recorder: Recorder, aten_library: torch.library.Library) -> None:
    """Register attention at the accelerator's autograd key, and the kernels of its two operators."""
    library = torch.library.Library("moai", "IMPL")
    _libraries.append(library)
    for op in (torch.ops.moai.sdpa.default, torch.ops.moai.sdpa_backward.default):
        operator = Operator(op)

        def kernel(*args: Any, _operator: Operator = operator) -> Any:
            return recorder.record(_operator, args, {})

        library.impl(op._schema.name.split("::")[1], kernel, "PrivateUse1")
    aten_library.impl("scaled_dot_product_attention", _attention, "AutogradPrivateUse1")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Any, k: Any, v: Any, mask: Any, is_causal: bool, scale: Any, enable_gqa: bool) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = torch.ops.moai.sdpa.default(q, k, v, mask, is_causal, scale, enable_gqa)
        ctx.save_for_backward(q, k, v, out, lse, mask)
        ctx.options = is_causal, scale, enable_gqa
        return out

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:  # type: ignore[override]
        q, k, v, out, lse, mask = ctx.saved_tensors
        with torch._C._AutoDispatchBelowAutograd():
            dq, dk, dv = torch.ops.moai.sdpa_backward.default(grad, q, k, v, out, lse, mask, *ctx.options)
        return dq, dk, dv, None, None, None, None


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    mask_needs_grad = attn_mask is not None and attn_mask.requires_grad
    if dropout_p > 0 or mask_needs_grad or q.dim() < 3:
        return torch.ops.aten._scaled_dot_product_attention_math.default(
            q, k, v, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )[0]
    if attn_mask is not None and is_causal:
        raise RuntimeError("scaled_dot_product_attention takes an attn_mask or is_causal=True, not both.")
    return _Attention.apply(q, k, v, attn_mask, is_causal, scale, enable_gqa)
