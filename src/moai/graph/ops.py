"""Operators of our own, defined once for every room: `torch.ops.moai.*`.

They exist where the aten form would lose what a plan needs (one node for attention, random numbers that do not depend
on how a tensor is split) or has no functional form (views by strides). All are functional. They run on CPU and CUDA
tensors alike; importing this module registers them.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten

_lib = torch.library.Library("moai", "DEF")

# scaled_dot_product_attention without dropout. Shapes: q [..., H, S, E], k and v [..., Hkv, T, E], mask broadcastable
# to [..., H, S, T]; lse (log-sum-exp of the scores, kept for the backward) [..., H, S].
_lib.define(
    "sdpa(Tensor q, Tensor k, Tensor v, Tensor? mask, bool is_causal, float? scale, bool enable_gqa)"
    " -> (Tensor out, Tensor lse)"
)
_lib.define(
    "sdpa_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? mask, bool is_causal,"
    " float? scale, bool enable_gqa) -> (Tensor dq, Tensor dk, Tensor dv)"
)

# aten.bmm with any number of batch dims, the same of both: [..., M, K] times [..., K, N].
_lib.define("matmul(Tensor self, Tensor other) -> Tensor")

# Rows times the matrix that each is for, of `weights` [E, K, M] by `ids` [N]: [N, K] -> [N, M]; and, as its backward to
# the weights, the sums over each one's rows of their outer products: [N, K], [N, M] -> [E, K, M].
_lib.define("rows_mm(Tensor self, Tensor weights, Tensor ids) -> Tensor")
_lib.define("rows_outer(Tensor self, Tensor other, Tensor ids, int n) -> Tensor")

# Random numbers: rows [start, start + size[0]) of a tensor whose row r depends on (seed, start + r) alone, so that
# every split along dim 0 draws the same numbers. kind: uniform [a, b), normal (mean a, std b), bernoulli (p = a),
# randint [a, b), exponential (rate a).
_lib.define("random(SymInt[] size, str kind, float a, float b, int seed, int start, ScalarType dtype) -> Tensor")
_lib.define("randperm(int n, int seed, ScalarType dtype) -> Tensor")
_lib.define("multinomial(Tensor probs, int num_samples, bool replacement, int seed) -> Tensor")

# A view given by strides over a base laid out with `base_stride`, and the base with such a view overwritten.
_lib.define(
    "as_strided(Tensor base, SymInt[] base_stride, SymInt[] size, SymInt[] stride, SymInt offset, ScalarType dtype)"
    " -> Tensor"
)
_lib.define(
    "as_strided_scatter(Tensor base, SymInt[] base_stride, Tensor src, SymInt[] size, SymInt[] stride, SymInt offset)"
    " -> Tensor"
)


def _flash_cpu_takes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> bool:
    return q.device.type == "cpu" and q.dim() == 4 and q.shape[-1] == k.shape[-1] == v.shape[-1]


def _rows_dense(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The CPU kernels walk along the last dim, whatever its stride is."""
    return [t if t.stride(-1) == 1 else t.contiguous() for t in tensors]


def _sdpa(q, k, v, mask, is_causal, scale, enable_gqa):
    q, k, v = _rows_dense(q, k, v)
    if _flash_cpu_takes(q, k, v):
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, attn_mask=_as_bias(mask, q), scale=scale
        )
    out = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
    )
    return out, q.new_zeros(q.shape[:-1], dtype=torch.float32)


def _sdpa_backward(grad, q, k, v, out, lse, mask, is_causal, scale, enable_gqa):
    grad, q, k, v, out = _rows_dense(grad, q, k, v, out)
    if _flash_cpu_takes(q, k, v) and not adds_up_repeated_heads(q, k):
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, is_causal, attn_mask=_as_bias(mask, q), scale=scale
        )
    if _flash_cpu_takes(q, k, v):
        return _backward_of_repeated_heads(grad, q, k, v, out, lse, mask, is_causal, scale)
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in (q, k, v)]
        redone = torch.nn.functional.scaled_dot_product_attention(
            leaves[0], leaves[1], leaves[2], attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=enable_gqa
        )
        return torch.autograd.grad(redone, leaves, grad)


def adds_up_repeated_heads(q: Any, k: Any) -> bool:
    """Whether shared key and value heads, [B, Hkv, T, E], are repeated for the CPU's backward kernel. The kernel would
    add up the gradients of the heads that share one in the dtype of the tensors, which halves are too short for."""
    return q.shape[1:2] != k.shape[1:2] and k.dtype.itemsize == 2


def _backward_of_repeated_heads(grad, q, k, v, out, lse, mask, is_causal, scale):
    """Repeats the key/value heads, then sums their gradients in float32, which rounds once."""
    groups = q.shape[1] // k.shape[1]
    kr, vr = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    dq, dk, dv = aten._scaled_dot_product_flash_attention_for_cpu_backward(
        grad, q, kr, vr, out, lse, 0.0, is_causal, attn_mask=_as_bias(mask, q), scale=scale
    )
    return dq, *(d.unflatten(1, (k.shape[1], groups)).sum(2) for d in (dk, dv))


def _as_bias(mask, q):
    """The CPU kernels want an additive mask in the dtype of the query."""
    if mask is None or mask.dtype == q.dtype:
        return mask
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=q.dtype, device=q.device).masked_fill_(mask.logical_not(), float("-inf"))
    return mask.to(q.dtype)


def _sdpa_meta(q, k, v, mask, is_causal, scale, enable_gqa):
    *lead, s, _ = q.shape
    # The CPU flash kernel writes [B, S, H, E] memory and returns it transposed; scripts rely on the cheap view back.
    if q.dim() == 4:
        b, h, s, _ = q.shape
        out = q.new_empty((b, s, h, v.shape[-1])).transpose(1, 2)
    else:
        out = q.new_empty((*lead, s, v.shape[-1]))
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    return out, q.new_empty((*lead, s), dtype=dtype)


def _sdpa_backward_meta(grad, q, k, v, out, lse, mask, is_causal, scale, enable_gqa):
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _row_seed(seed: int, row: int) -> int:
    """A well-mixed 63-bit seed for one row (splitmix64 finaliser: Steele, Lea and Flood, OOPSLA 2014)."""
    z = (seed + 0x9E3779B97F4A7C15 * (row + 1)) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return (z ^ (z >> 31)) & 0x7FFFFFFFFFFFFFFF


def _fill(row: torch.Tensor, kind: str, a: float, b: float, gen: torch.Generator) -> None:
    if kind == "uniform":
        row.uniform_(a, b, generator=gen)
    elif kind == "normal":
        row.normal_(a, b, generator=gen)
    elif kind == "bernoulli":
        row.bernoulli_(a, generator=gen)
    elif kind == "randint":
        row.random_(int(a), int(b), generator=gen)
    elif kind == "exponential":
        row.exponential_(a, generator=gen)
    else:
        raise ValueError(f"unknown kind of random numbers: {kind!r}")


def _matmul(self, other):
    return torch.bmm(self.flatten(0, -3), other.flatten(0, -3)).unflatten(0, self.shape[:-2])


def _rows_mm(self, weights, ids):
    order, ends = _sorted(ids, weights.shape[0])
    product = aten._grouped_mm(self[order], weights, ends)
    return torch.empty_like(product).index_copy_(0, order, product)


def _rows_outer(self, other, ids, n):
    order, ends = _sorted(ids, n)
    return aten._grouped_mm(self[order].t(), other[order], ends)


def _sorted(ids, n):
    """The order that brings together what is equal, and where each of 0, ..., n - 1 ends in it."""
    together, order = ids.sort(stable=True)
    return order, torch.searchsorted(together, torch.arange(n, device=ids.device), right=True, out_int32=True)


def _rows_mm_meta(self, weights, ids):
    return self.new_empty((self.shape[0], weights.shape[2]))


def _rows_outer_meta(self, other, ids, n):
    return self.new_empty((n, self.shape[1], other.shape[1]))


def _random(size, kind, a, b, seed, start, dtype):
    return random_rows(size, kind, a, b, seed, start, dtype, torch.device("cpu"))


def random_rows(size, kind, a, b, seed, start, dtype, device):
    """`torch.ops.moai.random` on a device of choice (the operator itself has no tensor argument to take it from)."""
    out = torch.empty(size, dtype=dtype, device=device)
    gen = torch.Generator(device)
    for i, row in enumerate(out if out.dim() else out[None]):
        gen.manual_seed(_row_seed(seed, start + i))
        _fill(row, kind, a, b, gen)
    return out


def _randperm(n, seed, dtype):
    return torch.randperm(n, generator=torch.Generator().manual_seed(_row_seed(seed, 0)), dtype=dtype)


def _multinomial(probs, num_samples, replacement, seed):
    gen = torch.Generator(probs.device).manual_seed(_row_seed(seed, 0))
    return torch.multinomial(probs, num_samples, replacement, generator=gen)


def _laid_out(base: torch.Tensor, stride) -> torch.Tensor:
    """`base` in memory of exactly `stride` (a copy unless it lies so already)."""
    stride = tuple(stride)
    if base.stride() == stride and base.storage_offset() == 0:
        return base
    return torch.empty_strided(base.shape, stride, dtype=base.dtype, device=base.device).copy_(base)


def _as_strided(base, base_stride, size, stride, offset, dtype):
    base = _laid_out(base, base_stride)
    if dtype == base.dtype:
        return base.as_strided(size, stride, offset).clone()
    view = torch.empty(0, dtype=dtype, device=base.device)
    return view.set_(base.untyped_storage(), offset, size, stride).clone()


def _as_strided_scatter(base, base_stride, src, size, stride, offset):
    out = torch.empty_strided(base.shape, base_stride, dtype=base.dtype, device=base.device).copy_(base)
    if src.dtype == out.dtype:
        out.as_strided(size, stride, offset).copy_(src)
    else:
        view = torch.empty(0, dtype=src.dtype, device=out.device)
        view.set_(out.untyped_storage(), offset, size, stride).copy_(src)
    return out


for _name, _fn in {
    "sdpa": _sdpa,
    "sdpa_backward": _sdpa_backward,
    "rows_mm": _rows_mm,
    "rows_outer": _rows_outer,
    "multinomial": _multinomial,
    "as_strided": _as_strided,
    "as_strided_scatter": _as_strided_scatter,
}.items():
    _lib.impl(_name, _fn, "CPU")
    _lib.impl(_name, _fn, "CUDA")
_lib.impl("sdpa", _sdpa_meta, "Meta")
_lib.impl("sdpa_backward", _sdpa_backward_meta, "Meta")
_lib.impl("rows_mm", _rows_mm_meta, "Meta")
_lib.impl("rows_outer", _rows_outer_meta, "Meta")
_lib.impl("matmul", _matmul, "CompositeExplicitAutograd")
_lib.impl("random", _random, "CompositeExplicitAutograd")
_lib.impl("randperm", _randperm, "CompositeExplicitAutograd")
