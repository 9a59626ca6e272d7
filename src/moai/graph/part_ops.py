"""Operators that work on one part of a dim that is looked up by number: classes, vocabulary entries, heads.

`start` says where along the dim the part at hand begins; with the whole dim and start 0 they are the ordinary ones.
The results over all parts add up (losses, embeddings), or are parts themselves (gradients). All are functional, run on
CPU and CUDA tensors alike, and have no gradient formulas: graphs hold their backwards as nodes of their own.

Importing this module registers them in `torch.ops.moai`.
"""

from __future__ import annotations

import torch

aten = torch.ops.aten

_lib = torch.library.Library("moai", "FRAGMENT")

# Class-index loss of log-probabilities [N, C] of classes [start, start + C): minus the entry at each target, times its
# weight, 0 where the target is elsewhere or ignored. reduction 0: [N]; 2: their sum. `weight` [all classes].
_lib.define(
    "class_loss(Tensor self, Tensor target, Tensor? weight, int reduction, int ignore_index, int start) -> Tensor"
)
# The sum of the weights of the targets that count (a number, in the dtype given).
_lib.define("class_weight(Tensor target, Tensor? weight, int ignore_index, ScalarType dtype) -> Tensor")
# The gradient [N, C] of class_loss, given that of its result ([N] or a number).
_lib.define(
    "class_loss_backward(Tensor grad, Tensor target, Tensor? weight, int ignore_index, SymInt[] size, int start)"
    " -> Tensor"
)
# Rows of `weight`, which holds entries [start, start + len(weight)); zeros for indices elsewhere.
_lib.define("embedding(Tensor weight, Tensor indices, int start) -> Tensor")
_lib.define("embedding_backward(Tensor grad, Tensor indices, SymInt num_weights, int padding_idx, int start) -> Tensor")
# Heads [start, start + n_heads) of [B, Hkv, T, E] with every head repeated `group` times, and the sum that is its
# backward: [B, h, T, E] of such heads -> [B, n_kv, T, E].
_lib.define("repeat_heads(Tensor self, SymInt n_heads, int group, int start) -> Tensor")
_lib.define("sum_heads(Tensor self, int n_kv, int group, int start) -> Tensor")


def _here(target: torch.Tensor, ignore_index: int, start: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which targets lie in the part and count, and each one's place in it (0 for the others)."""
    place = target - start
    here = (place >= 0) & (place < length) & (target != ignore_index)
    return here, torch.where(here, place, 0)


def _factor(here: torch.Tensor, target: torch.Tensor, weight: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """0 where a target is not here, else its weight."""
    if weight is None:
        return here.to(dtype)
    return torch.where(here, weight[torch.where(here, target, 0)].to(dtype), 0)


def _class_loss(self, target, weight, reduction, ignore_index, start):
    here, place = _here(target, ignore_index, start, self.shape[1])
    picked = self.gather(1, place[:, None])[:, 0]
    # Not a product: 0 * -inf is no number.
    loss = torch.where(here, -picked * _factor(here, target, weight, self.dtype), 0)
    return loss.sum() if reduction == 2 else loss


def _class_weight(target, weight, ignore_index, dtype):
    counts = target != ignore_index
    return _factor(counts, target, weight, dtype).sum()


def _class_loss_backward(grad, target, weight, ignore_index, size, start):
    here, place = _here(target, ignore_index, start, size[1])
    entry = -grad * _factor(here, target, weight, grad.dtype)
    return grad.new_zeros(size).scatter_(1, place[:, None], entry.expand(target.shape)[:, None])


def _embedding(weight, indices, start):
    here, place = _here(indices, -1, start, weight.shape[0])
    return torch.where(here[..., None], weight[place], 0)


def _embedding_backward(grad, indices, num_weights, padding_idx, start):
    here, place = _here(indices, padding_idx, start, num_weights)
    rows = torch.where(here[..., None], grad, 0).reshape(-1, grad.shape[-1])
    return aten.embedding_dense_backward(rows, place.reshape(-1), num_weights, -1, False)


def _sources(start: int, n_heads: int, group: int, like: torch.Tensor) -> torch.Tensor:
    return torch.arange(start, start + n_heads, device=like.device) // group


def _repeat_heads(self, n_heads, group, start):
    return self.index_select(1, _sources(start, n_heads, group, self))


def _sum_heads(self, n_kv, group, start):
    out = self.new_zeros((self.shape[0], n_kv, *self.shape[2:]))
    return out.index_add_(1, _sources(start, self.shape[1], group, self), self)


for _name, _fn in {
    "class_loss": _class_loss,
    "class_weight": _class_weight,
    "class_loss_backward": _class_loss_backward,
    "embedding": _embedding,
    "embedding_backward": _embedding_backward,
    "repeat_heads": _repeat_heads,
    "sum_heads": _sum_heads,
}.items():
    _lib.impl(_name, _fn, "CompositeExplicitAutograd")
