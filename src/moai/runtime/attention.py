"""The backward of causal attention in float32 on a CPU, as products of many heads at a time.

PyTorch's kernel takes one head and a few rows at a time, and its products are small. Here the rows of all heads that
share keys are one factor, products are batched over heads, and what a block of rows does not see is left out. Which is
faster depends on the sizes: where heads are wide, this takes some 20 % less time.

In: the tensors of `moai.sdpa_backward`. Out: what it gives, in memory as there; sums are in another order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from moai.graph.step_graph import Ref, flat_ids
from moai.lower.program import Instruction
from moai.runtime.layout import Layout

aten = torch.ops.aten

# Tokens in a block: fewer make small products, more compute what is masked.
_BLOCK = 32
# Of the scores that are there at a time: they stay in a core's cache.
_SCORES_BYTES = 1 << 20
# Below so many multiplications in a product, what calls cost beside them decides.
_LEAST_WORK = 1 << 24
# Of longer sequences, PyTorch's kernel takes more rows at a time.
_MOST_TOKENS = 2048
# Multiplications in a product that is tried: more of the same take as much longer with either.
_TRIED_WORK = 1 << 27


def is_causal_backward(instruction: Instruction) -> bool:
    """Whether the instruction is the backward of attention to what came before and no other mask, of different tensors
    and with all of its results."""
    if instruction.op != "moai.sdpa_backward.default" or instruction.kwargs:
        return False
    *tensors, mask, is_causal, _, _ = instruction.args
    return (
        mask is None
        and is_causal is True
        and (scale(instruction) is None or isinstance(scale(instruction), float))
        and len({x.id for x in tensors if isinstance(x, Ref)}) == len(tensors)
        and len(list(flat_ids(instruction.outs))) == 3
    )


def scale(instruction: Instruction) -> float | None:
    """What scores are multiplied with; None for the default."""
    found: float | None = instruction.args[8]
    return found


def is_for_products(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether `tensors` (grad, q, k, v, out, lse) are such that products may be worth trying."""
    _, q, k, v, *_ = tensors
    return (
        all(x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 4 for x in (q, k, v))
        and k.shape == v.shape
        and (q.shape[0], *q.shape[2:]) == (k.shape[0], *k.shape[2:])
        and q.shape[1] % k.shape[1] == 0
        and k.shape[2] <= _MOST_TOKENS
        and q.numel() * k.shape[2] >= _LEAST_WORK
    )


def examples(layouts: Sequence[Layout]) -> list[torch.Tensor]:
    """Tensors that lie like these, of as many samples and heads as are enough."""
    _, q, k, *_ = layouts
    batch, heads, tokens, width = k.shape
    pairs = max(1, _TRIED_WORK // (q.shape[1] // heads * tokens * tokens * width))
    n_samples, n_heads = min(batch, max(1, pairs // heads)), min(heads, pairs)

    def example(x: Layout) -> torch.Tensor:
        shape = (n_samples, x.shape[1] // heads * n_heads, *x.shape[2:])
        return torch.empty_strided(shape, x.stride, dtype=x.dtype).fill_(1)

    return [example(x) for x in layouts]


def by_products(
    inputs: list[torch.Tensor], scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of q, k and v, given [grad, q, k, v, out, lse]. Empties `inputs`."""
    grad, q, k, v, *_ = inputs
    inputs.clear()
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    dq, dk, dv = map(_as_the_kernels, (q, k, v))
    for shared, own in _parts(q, k):
        keys, values = (x[shared].reshape(-1, *x.shape[2:]) for x in (k, v))  # [pairs, T, E]
        rows, grads = _rows(q[own], k[shared], factor), _rows(grad[own], k[shared])
        of_rows, of_keys, of_values = torch.empty_like(rows), torch.zeros_like(keys), torch.zeros_like(values)
        for block, seen, scores in _blocks(rows, keys):
            weights = aten._softmax.out(scores, -1, False, out=scores)
            of_values[:, seen].baddbmm_(weights.mT, grads[:, block])
            of_weights = torch.bmm(grads[:, block], values[:, seen].mT)
            of_scores = aten._softmax_backward_data.out(of_weights, weights, -1, weights.dtype, grad_input=of_weights)
            torch.bmm(of_scores, keys[:, seen], out=of_rows[:, block])
            of_keys[:, seen].baddbmm_(of_scores.mT, rows[:, block])
        grouped = _grouped(dq[own], k[shared])
        torch.mul(of_rows.view(grouped.shape), factor, out=grouped)
        dk[shared].copy_(of_keys.view(k[shared].shape))
        dv[shared].copy_(of_values.view(v[shared].shape))
    return dq, dk, dv


def _as_the_kernels(x: torch.Tensor) -> torch.Tensor:
    """A new [B, H, T, E] tensor, in memory [B, T, H, E]."""
    return x.new_empty(x.transpose(1, 2).shape).transpose(1, 2)


def _parts(q: torch.Tensor, k: torch.Tensor) -> Iterator[tuple[tuple[slice, slice], tuple[slice, slice]]]:
    """What is computed at a time: some samples' key heads, and the heads of `q` that share them."""
    batch, heads, tokens, _ = k.shape
    group = q.shape[1] // heads
    pairs = max(1, _SCORES_BYTES // (_BLOCK * group * tokens * k.itemsize))
    n_samples = max(1, pairs // heads)
    for sample in range(0, batch, n_samples):
        samples = slice(sample, sample + n_samples)
        for head in range(0, heads, pairs):
            yield (samples, slice(head, head + pairs)), (samples, slice(head * group, (head + pairs) * group))


def _grouped(x: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """A view of [B, H, T, E] as [B, Hkv, T, G, E]: heads that share keys are beside each other."""
    return x.unflatten(1, (k.shape[1], -1)).transpose(2, 3)


def _rows(x: torch.Tensor, k: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
    """[B, H, T, E] times `factor` as [B * Hkv, T * G, E], dense."""
    grouped = _grouped(x, k)
    out = x.new_empty(grouped.shape)
    torch.mul(grouped, factor, out=out)
    return out.view(-1, grouped.shape[2] * grouped.shape[3], x.shape[-1])


def _blocks(rows: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """Blocks of rows, the tokens that they see, and their scores: -inf for those tokens of the block that a row does
    not see."""
    tokens = keys.shape[1]
    group = rows.shape[1] // tokens
    future = keys.new_full((_BLOCK, _BLOCK), -math.inf).triu_(1).repeat_interleave(group, 0)
    for start in range(0, tokens, _BLOCK):
        stop = min(start + _BLOCK, tokens)
        block, seen = slice(start * group, stop * group), slice(0, stop)
        scores = torch.bmm(rows[:, block], keys[:, seen].mT)
        scores[..., start:] += future[: (stop - start) * group, : stop - start]
        yield block, seen, scores
