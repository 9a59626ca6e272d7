"""Operators on sequences of uneven lengths that torch writes for each device: bags of embeddings, packed sequences.

In: indices with offsets, or sequences with their lengths (which are on the CPU, as torch has it). Out: the same results
of operators that every device has; torch differentiates them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

_SUM, _MEAN, _MAX = 0, 1, 2
_MODES = {"sum": _SUM, "mean": _MEAN, "max": _MAX}


def table() -> dict[str, Callable[..., Any]]:
    """Operator name -> kernel, for the accelerator with autograd."""
    return {
        "_embedding_bag": _embedding_bag,
        "_embedding_bag_forward_only": _embedding_bag,
        "_pack_padded_sequence": _pack_padded_sequence,
    }


def install() -> None:
    """Bags of equal size, one a row of indices, keep their rows: devices share them. Call once."""
    embedding_bag = F.embedding_bag

    @functools.wraps(embedding_bag)
    def by_rows(
        input: torch.Tensor,
        weight: torch.Tensor,
        offsets: torch.Tensor | None = None,
        max_norm: float | None = None,
        norm_type: float = 2,
        scale_grad_by_freq: bool = False,
        mode: str = "mean",
        sparse: bool = False,
        per_sample_weights: torch.Tensor | None = None,
        include_last_offset: bool = False,
        padding_idx: int | None = None,
    ) -> torch.Tensor:
        if weight.device.type in ("cpu", "meta") or input.dim() != 2 or offsets is not None or mode not in _MODES:
            return embedding_bag(
                input, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights,
                include_last_offset, padding_idx,
            )  # fmt: skip
        rows = F.embedding(input, weight, None, max_norm, norm_type, scale_grad_by_freq)
        if per_sample_weights is not None:
            rows = rows * per_sample_weights.unsqueeze(-1)
        there = None if padding_idx is None else (input != padding_idx % weight.size(0)).unsqueeze(-1)
        if mode == "max":
            if there is not None:
                rows = rows.masked_fill(~there, float("-inf"))
            found = rows.amax(1)
            return found if there is None else found.masked_fill(~there.any(1), 0.0)
        total = (rows if there is None else rows * there).sum(1)
        if mode == "sum":
            return total
        return total / (max(input.size(1), 1) if there is None else there.sum(1).clamp(min=1))

    F.embedding_bag = by_rows


def _embedding_bag(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Indices [L], offsets [bags] -> rows [bags, width], and for each index its bag, the bags' sizes, and nothing."""
    bags = offsets.numel() - include_last_offset
    positions = torch.arange(indices.numel(), device=indices.device)
    bag = torch.searchsorted(offsets[:bags].contiguous().long(), positions, right=True) - 1
    rows = F.embedding(indices, weight, None, scale_grad_by_freq=scale_grad_by_freq)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1)
    there = torch.ones_like(bag) if padding_idx < 0 else (indices != padding_idx).long()
    size = torch.zeros(bags, dtype=torch.long, device=bag.device).index_add_(0, bag, there)
    if mode == _MAX:
        lowest = rows.new_full((bags, weight.size(1)), float("-inf"))
        rows = rows.masked_fill((there == 0).unsqueeze(-1), float("-inf"))
        found = lowest.scatter_reduce(0, bag.unsqueeze(-1).expand_as(rows), rows, "amax")
        found = found.masked_fill((size == 0).unsqueeze(-1), 0.0)
    else:
        rows = rows * there.unsqueeze(-1).to(rows.dtype)
        found = rows.new_zeros(bags, weight.size(1)).index_add(0, bag, rows)
        if mode == _MEAN:
            found = found / size.clamp(min=1).unsqueeze(-1)
    return found, bag, size, size.new_empty(0)


def _pack_padded_sequence(
    input: torch.Tensor, lengths: torch.Tensor, batch_first: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T, B, ...] (or [B, T, ...]) and lengths [B] on the CPU, the longest first -> [their sum, ...] and how many
    sequences each of the longest one's steps has [T], on the CPU."""
    sequences = input.transpose(0, 1) if batch_first else input
    known = lengths.cpu().tolist()
    if any(n <= 0 for n in known):
        raise RuntimeError("Length of all samples has to be greater than 0, but found an element that is <= 0")
    if known != sorted(known, reverse=True):
        raise RuntimeError(
            "`lengths` array must be sorted in decreasing order when `enforce_sorted` is True. You can pass "
            "`enforce_sorted=False` to pack_padded_sequence."
        )
    sizes = torch.tensor([sum(n > t for n in known) for t in range(known[0])])
    batch = sequences.size(1)
    taken = torch.cat([torch.arange(int(n)) + t * batch for t, n in enumerate(sizes)])
    return sequences.flatten(0, 1).index_select(0, taken.to(input.device)), sizes
