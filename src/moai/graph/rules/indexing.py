"""Rules of look-ups by index and of their scatters."""

from __future__ import annotations

import torch

from moai.graph.rules.dims import Call, Dims, Rule
from moai.graph.rules.views import along
from moai.graph.step_graph import Ref

aten = torch.ops.aten
moai = torch.ops.moai


def embedding(call: Call) -> Dims:
    lead = tuple(range(len(call.inputs[1].shape)))
    return Dims(((None, "h"), lead), ((*lead, "h"),))


def embedding_dense_backward(call: Call) -> Dims | None:
    lead = tuple(range(len(call.inputs[1].shape)))
    # Scaling by frequency counts every index of the batch: no part knows them all.
    summed = frozenset() if call["scale_grad_by_freq"] else frozenset(lead)
    return Dims(((*lead, "h"), lead), ((None, "h"),), summed=summed)


def part_of_embedding(call: Call) -> Dims:
    lead = tuple(range(len(call.inputs[1].shape)))
    return Dims((("v", "h"), lead), ((*lead, "h"),), summed=frozenset("v"), starts={"start": "v"})


def part_of_embedding_backward(call: Call) -> Dims:
    lead = tuple(range(len(call.inputs[1].shape)))
    inputs = (*lead, "h"), lead
    sizes = {"num_weights": ("v",)}
    return Dims(inputs, (("v", "h"),), summed=frozenset(lead), sizes=sizes, starts={"start": "v"})


def gather(call: Call) -> Dims:
    """gather, scatter, scatter_add, ...: dims other than `dim` run together where all tensors are equally long."""
    rank = len(call.outputs[0].shape)
    at = call["dim"] % max(rank, 1)
    full = [t for t in call.inputs if len(t.shape) == rank]
    free = tuple(d if d != at and len({t.shape[d] for t in full}) == 1 else None for d in range(rank))
    inputs = tuple(free if len(t.shape) == rank else (None,) * len(t.shape) for t in call.inputs)
    # The entries picked along `dim` are independent of each other.
    if call.op is aten.gather.default:
        picked = tuple("picked" if d == at else f for d, f in enumerate(free))
        return Dims((inputs[0], picked), (picked,))
    return Dims(inputs, (free,))


def index_select(call: Call) -> Dims:
    rank = len(call.inputs[0].shape)
    at = call["dim"] % max(rank, 1)
    source = tuple(None if d == at else d for d in range(rank))
    picked = ("picked",) if call.inputs[1].shape else ()
    out = tuple(("picked" if picked else None) if d == at else d for d in range(rank))
    return Dims((source, picked), (out,))


def _index_dims(call: Call) -> tuple[tuple[int | None, ...], list[tuple], tuple] | None:
    """Factors of self, of each index tensor, and of self[indices] (None where the indices hold masks)."""
    source: Ref = call["self"]
    rank = len(call.type_of(source).shape)
    indices = list(call["indices"])
    tensors = [call.type_of(i) for i in indices if i is not None]
    if any(t.dtype in (torch.bool, torch.uint8) for t in tensors):
        return None
    at = [d for d, i in enumerate(indices) if i is not None]
    free = tuple(None if d in at else d for d in range(rank))
    wide = torch.broadcast_shapes(*(t.shape for t in tensors))
    lead = [len(wide) - len(t.shape) for t in tensors]
    picked = [
        tuple(f"i{n + d}" if s == wide[n + d] else None for d, s in enumerate(t.shape))
        for t, n in zip(tensors, lead, strict=True)
    ]
    together = at == list(range(at[0], at[-1] + 1))
    where = at[0] if together else 0
    kept = [d for d in range(rank) if d not in at]
    before = [d for d in kept if d < where]
    out = (*before, *(f"i{d}" for d in range(len(wide))), *(d for d in kept if d >= where))
    return free, picked, out


def index(call: Call) -> Dims | None:
    found = _index_dims(call)
    if found is None:
        return None
    free, picked, out = found
    return Dims((free, *picked), (out,))


def index_put(call: Call) -> Dims | None:
    """Split along the dims that are not indexed. Accumulation from a split index is taken apart by `lower`."""
    found = _index_dims(call)
    if found is None:
        return None
    free, picked, out = found
    values = call.inputs[-1].shape
    lead = len(out) - len(values)
    into = call.outputs[0].shape
    value_dims = tuple(
        f if isinstance(f := out[lead + d], int) and s == into[f] else None for d, s in enumerate(values)
    )
    return Dims((free, *((None,) * len(p) for p in picked), value_dims), (free,))


def _index_put_into_zeros(call: Call) -> Dims | None:
    if not call["accumulate"]:
        return index_put(call)
    found = _index_dims(call)
    if found is None:
        return None
    free, picked, out = found
    values, into = call.inputs[-1].shape, call.outputs[0].shape
    lead = len(out) - len(values)
    lengths = {
        f: s
        for p, t in zip(picked, call.inputs[1:-1], strict=True)
        for f, s in zip(p, t.shape, strict=True)
        if f is not None
    }
    value_dims = tuple(
        f if s == (into[f] if isinstance(f := out[lead + d], int) else lengths[f]) else None
        for d, s in enumerate(values)
    )
    return Dims((free, *picked, value_dims), (free,), summed=frozenset(lengths))


def _index_add_into_zeros(call: Call) -> Dims:
    rank = len(call.inputs[0].shape)
    at = call["dim"] % max(rank, 1)
    free = tuple(None if d == at else d for d in range(rank))
    added = tuple("added" if d == at else d for d in range(rank))
    return Dims((free, ("added",)[: len(call.inputs[1].shape)], added), (free,), summed=frozenset({"added"}))


def _scatter_add_into_zeros(call: Call) -> Dims:
    plain = gather(call)
    at = call["dim"] % max(len(call.outputs[0].shape), 1)
    index, source = call.inputs[1:]
    if index.shape[at : at + 1] != source.shape[at : at + 1]:
        return plain
    added = tuple("added" if d == at else f for d, f in enumerate(plain.inputs[1]))
    return Dims((plain.inputs[0], added, added), plain.outputs, summed=frozenset({"added"}))


def index_fill(call: Call) -> Dims:
    """index_fill, index_copy: free along the dims that are not indexed."""
    rank = len(call.outputs[0].shape)
    at = call["dim"] % max(rank, 1)
    free = tuple(None if d == at else d for d in range(rank))
    return Dims(
        tuple(free if k != 1 and len(t.shape) == rank else (None,) * len(t.shape) for k, t in enumerate(call.inputs)),
        (free,),
    )


def buckets(call: Call) -> Dims | None:
    """bucketize, searchsorted among one row of boundaries: every entry is looked up by itself."""
    first = call.op is aten.searchsorted.Tensor
    if len(call.inputs) != 2 or len(call.inputs[0 if first else 1].shape) != 1:
        return None
    own = tuple(range(len(call.outputs[0].shape)))
    return Dims(((None,), own) if first else (own, (None,)), (own,))


def index_add(call: Call) -> Dims:
    """Split along the dims that are not indexed."""
    whole = _index_add_into_zeros(call)
    return Dims((whole.inputs[0], (None,) * len(whole.inputs[1]), whole.inputs[0]), whole.outputs)


# What holds besides when the target is known to hold zeros: the result is a sum over what is added.
INTO_ZEROS: dict[torch._ops.OpOverload, Rule] = {
    **dict.fromkeys((aten.index_put.default, aten._unsafe_index_put.default), _index_put_into_zeros),
    aten.index_add.default: _index_add_into_zeros,
    aten.scatter_add.default: _scatter_add_into_zeros,
}

RULES: dict[torch._ops.OpOverload, Rule] = {
    aten.embedding.default: embedding,
    aten.embedding_dense_backward.default: embedding_dense_backward,
    moai.embedding.default: part_of_embedding,
    moai.embedding_backward.default: part_of_embedding_backward,
    **dict.fromkeys(
        (
            aten.gather.default,
            aten.scatter.src,
            aten.scatter.value,
            aten.scatter_add.default,
            aten.scatter_reduce.two,
            aten.scatter.reduce,
        ),
        gather,
    ),
    aten.index_select.default: index_select,
    aten.index_add.default: index_add,
    **dict.fromkeys(
        (aten.index_fill.int_Scalar, aten.index_fill.int_Tensor, aten.index_copy.default),
        index_fill,
    ),
    **dict.fromkeys((aten.bucketize.Tensor, aten.searchsorted.Tensor), buckets),
    **dict.fromkeys((aten.index.Tensor, aten._unsafe_index.Tensor), index),
    **dict.fromkeys((aten.index_put.default, aten._unsafe_index_put.default), index_put),
    **dict.fromkeys(
        (
            aten.cumsum.default,
            aten.cumprod.default,
            aten.logcumsumexp.default,
            aten.cummax.default,
            aten.cummin.default,
            aten.sort.default,
            aten.sort.stable,
            aten.topk.default,
        ),
        along,
    ),
}
