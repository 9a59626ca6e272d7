"""Rules of operators that re-arrange entries: views, their scatters and backwards, joins and splits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch

from moai.graph.rules.dims import Blocked, Call, DimFactors, Dims, Nested, Rule, Unit, common_loops, shared_out
from moai.graph.rules.pointwise import broadcast

aten = torch.ops.aten

Shape = tuple[int, ...]


def _own(rank: int) -> tuple[int, ...]:
    return tuple(range(rank))


def _without(dims: Sequence[int | None], *fixed: int) -> DimFactors:
    """`dims` with the factors of the dims `fixed` taken away: these must stay whole."""
    return tuple(None if d in fixed else f for d, f in enumerate(dims))


def groups(before: Sequence[int], after: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The dims that a reshape maps onto each other: the smallest runs of both shapes that hold equally many entries.

    Dims of size 1 belong to no group. Neither shape may hold a zero.
    """
    found = []
    left = [d for d, s in enumerate(before) if s != 1]
    right = [d for d, s in enumerate(after) if s != 1]
    i = j = 0
    while i < len(left):
        a, b = [left[i]], [right[j]]
        n, m = before[left[i]], after[right[j]]
        while n != m:
            if n < m:
                i += 1
                a.append(left[i])
                n *= before[left[i]]
            else:
                j += 1
                b.append(right[j])
                m *= after[right[j]]
        found.append((a, b))
        i, j = i + 1, j + 1
    return found


def reshape(call: Call) -> Dims | None:
    """Split along the first dim of a group, a reshape stays local: the parts are consecutive entries.

    `lower` brings every view by sizes into the form of aten.reshape first.
    """
    return _along_first_dims(call.inputs[0].shape, call.outputs[0].shape)


def reshape_inside(call: Call, inside: Callable[[int, int], bool]) -> Dims | None:
    """As `reshape`, but where `inside` is true of a value and its dim, along every loop that this dim is made of:
    [3*H*E] is split as the H of [3, H, E] is."""
    before, after = call.inputs[0].shape, call.outputs[0].shape
    plain = _along_first_dims(before, after)
    ids = call.input_ids[0], call.node.outs
    if plain is None or not any(inside(i, d) for i, s in zip(ids, (before, after), strict=True) for d in range(len(s))):
        return plain
    source, result = list(plain.inputs[0]), list(plain.outputs[0])
    for name, (a, b) in enumerate(groups(before, after)):
        loops = None if len(a) == len(b) == 1 else _loops(call, inside, name, a, b)
        if loops is None:
            continue
        for dims, entries, shape in ((a, source, before), (b, result, after)):
            for d, own in zip(dims, shared_out(loops, [n for _, n in loops], [shape[d] for d in dims]), strict=True):
                entries[d] = Nested(tuple(own)) if len(own) > 1 else own[0][0]
    return Dims((tuple(source),), (tuple(result),), sizes={"shape": tuple(result)})


@lru_cache(maxsize=4096)
def _along_first_dims(before: Shape, after: Shape) -> Dims | None:
    if 0 in before:
        return None
    source: list[Any] = [None] * len(before)
    result: list[Any] = [None] * len(after)
    for name, (a, b) in enumerate(groups(before, after)):
        if len(a) == len(b) == 1:
            source[a[0]] = result[b[0]] = name
            continue
        inner_a = math.prod(before[d] for d in a[1:])
        inner_b = math.prod(after[d] for d in b[1:])
        common = math.gcd(inner_a, inner_b)
        source[a[0]] = Unit(name, inner_b // common)
        result[b[0]] = Unit(name, inner_a // common)
    return Dims((tuple(source),), (tuple(result),), sizes={"shape": tuple(result)})


def _loops(
    call: Call, inside: Callable[[int, int], bool], name: int, a: list[int], b: list[int]
) -> list[tuple[Any, int]] | None:
    """The loops of a group with their lengths; those that are in no dim of which `inside` is true have no factor."""
    sides = ((call.input_ids[0], a, call.inputs[0].shape), (call.node.outs, b, call.outputs[0].shape))
    marked = [(dims, shape, [inside(id_, d) for d in dims]) for id_, dims, shape in sides]
    if not any(any(marks) for _, _, marks in marked):
        return None
    lengths = common_loops(tuple(marked[0][1][d] for d in a), tuple(marked[1][1][d] for d in b))
    if lengths is None:
        return None
    free: set[int] = set()
    for dims, shape, marks in marked:
        for own, mark in zip(shared_out(range(len(lengths)), lengths, [shape[d] for d in dims]), marks, strict=True):
            free.update(own if mark else ())
    return [((name, k) if k in free else None, length) for k, length in enumerate(lengths)]


def permute(call: Call) -> Dims:
    """Every permutation (`lower` spells them all so)."""
    rank = len(call.inputs[0].shape)
    order = [d % rank for d in call["dims"]]
    return Dims((_own(rank),), (tuple(order),))


def unsqueeze(call: Call) -> Dims:
    rank = len(call.inputs[0].shape)
    at = call["dim"] % (rank + 1)
    return Dims((_own(rank),), ((*range(at), None, *range(at, rank)),))


def squeeze(call: Call) -> Dims:
    shape = call.inputs[0].shape
    named = call.dims("dim", len(shape))
    kept = tuple(d for d, s in enumerate(shape) if not (s == 1 and d in named))
    return Dims((_own(len(shape)),), (kept,))


def expand(call: Call) -> Dims:
    out = call.outputs[0]
    own = _own(len(out.shape))
    return Dims((broadcast(call.inputs[0], out),), (own,), sizes={"size": own})


def repeat(call: Call) -> Dims:
    source, out = call.inputs[0].shape, call.outputs[0].shape
    lead = len(out) - len(source)
    once = tuple(d if n == 1 else None for d, n in enumerate(call["repeats"]))
    return Dims((once[lead:],), (once,))


def along(call: Call) -> Dims:
    """Whole along `dim`, free elsewhere; every tensor keeps its rank (slice, split, cumsum, sort, softmax, ...)."""
    rank = max(len(t.shape) for t in call.inputs)
    free = _without(_own(rank), *call.dims("dim", rank)[:1])
    return Dims((free,) * len(call.inputs), (free,) * len(call.outputs))


def split(call: Call) -> Dims:
    """Equal runs may be split all alike: fused projections are cut so."""
    rank = len(call.inputs[0].shape)
    at = call.dims("dim", rank)[0]
    lengths = {t.shape[at] for t in call.outputs}
    plain = along(call)
    if len(lengths) > 1 or len(call.outputs) * call.outputs[0].shape[at] != call.inputs[0].shape[at]:
        return plain
    whole, part = list(plain.inputs[0]), list(plain.outputs[0])
    whole[at], part[at] = Blocked(at, len(call.outputs)), at
    argument = "split_size" if "split_size" in call.args else "split_sizes"
    sizes = {argument: (at,) * (1 if argument == "split_size" else len(call.outputs))}
    return Dims((tuple(whole),), (tuple(part),) * len(call.outputs), sizes=sizes)


def slice_(call: Call) -> Dims:
    source, out = call.inputs[0].shape, call.outputs[0].shape
    own = _own(len(source))
    if source == out and call["step"] == 1:
        return Dims((own,), (own,))  # start and end reach beyond a part as they reach the ends of the whole
    run = _run(call, source, out)
    if run is None:
        return along(call)
    blocked, sizes = run
    return Dims((blocked,), (own,), sizes=sizes)


def _run(call: Call, long: Sequence[int], short: Sequence[int]) -> tuple[DimFactors, dict[str, DimFactors]] | None:
    """Where a slice is one of equal runs: the factors of the long side, and the bounds, which follow a split of all."""
    at = call["dim"] % len(long)
    length = short[at]
    start = call["start"] or 0
    if call["step"] != 1 or length in (0, 1) or start < 0 or start % length or long[at] % length:
        return None
    own = _own(len(long))
    blocked = (*own[:at], Blocked(at, long[at] // length), *own[at + 1 :])
    k = start // length
    return blocked, {"start": (Unit(at, k),), "end": (Unit(at, k + 1),)}


def drop(call: Call) -> Dims:
    """`dim` is looked up and vanishes (select, unbind)."""
    rank = len(call.inputs[0].shape)
    at = call.dims("dim", rank)[0]
    kept = tuple(d for d in range(rank) if d != at)
    return Dims((_without(_own(rank), at),), (kept,) * len(call.outputs))


def cat(call: Call) -> Dims:
    rank = len(call.outputs[0].shape)
    at = call.dims("dim", rank)[0]
    if len(call.inputs) > 1 and len({t.shape for t in call.inputs}) == 1 and len(call.inputs[0].shape) == rank:
        own = _own(rank)
        return Dims((own,) * len(call.inputs), ((*own[:at], Blocked(at, len(call.inputs)), *own[at + 1 :]),))
    free = _without(_own(rank), at)
    # Legacy: an empty [0] tensor may stand among tensors of any rank.
    return Dims(tuple(free if len(t.shape) == rank else (None,) * len(t.shape) for t in call.inputs), (free,))


def stack(call: Call) -> Dims:
    rank = len(call.inputs[0].shape)
    at = call["dim"] % (rank + 1)
    return Dims((_own(rank),) * len(call.inputs), ((*range(at), None, *range(at, rank)),))


def select_scatter(call: Call) -> Dims:
    rank = len(call.inputs[0].shape)
    at = call["dim"] % rank
    free = _without(_own(rank), at)
    return Dims((free, tuple(d for d in range(rank) if d != at)), (free,))


def slice_backward(call: Call) -> Dims:
    rank = len(call.outputs[0].shape)
    run = _run(call, call.outputs[0].shape, call.inputs[0].shape)
    if run is not None:
        blocked, sizes = run
        return Dims((_own(rank),), (blocked,), sizes=sizes | {"input_sizes": blocked})
    free = _without(_own(rank), call["dim"] % rank)
    return Dims((free,), (free,), sizes={"input_sizes": free})


def select_backward(call: Call) -> Dims:
    rank = len(call.outputs[0].shape)
    at = call["dim"] % rank
    free = _without(_own(rank), at)
    return Dims((tuple(d for d in range(rank) if d != at),), (free,), sizes={"input_sizes": free})


def flip(call: Call) -> Dims:
    rank = len(call.inputs[0].shape)
    free = _without(_own(rank), *(d % rank for d in call["dims"]))
    return Dims((free,), (free,))


def pad(call: Call) -> Dims:
    source, out = call.inputs[0].shape, call.outputs[0].shape
    padding = call["pad"]
    padded = {len(source) - 1 - i // 2 for i, p in enumerate(padding) if p != 0}
    free = _without(_own(len(out)), *padded)
    return Dims((free,), (free,))


def lower_or_upper(call: Call) -> Dims:
    """tril, triu: entries are kept by their position in the last two dims."""
    rank = len(call.inputs[0].shape)
    free = _without(_own(rank), rank - 2, rank - 1)
    return Dims((free,), (free,))


def fourier(call: Call) -> Dims:
    """Free along the dims that are not transformed."""
    rank = len(call.inputs[0].shape)
    free = _without(_own(rank), *call.dims("dim", rank))
    return Dims((free,), (free,))


def complex_pair(call: Call) -> Dims:
    """view_as_real and back: a last dim of size 2 comes or goes."""
    shared = _own(min(len(call.inputs[0].shape), len(call.outputs[0].shape)))
    return Dims(((*shared, None)[: len(call.inputs[0].shape)],), ((*shared, None)[: len(call.outputs[0].shape)],))


RULES: dict[torch._ops.OpOverload, Rule] = {
    aten.reshape.default: reshape,
    aten.permute.default: permute,
    aten.unsqueeze.default: unsqueeze,
    **dict.fromkeys((aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims), squeeze),
    aten.expand.default: expand,
    aten.repeat.default: repeat,
    aten.slice.Tensor: slice_,
    **dict.fromkeys(
        (
            aten.split.Tensor,
            aten.split_with_sizes.default,
            aten.unsafe_split.Tensor,
            aten.unsafe_split_with_sizes.default,
        ),
        split,
    ),
    aten.slice_scatter.default: along,
    **dict.fromkeys((aten.select.int, aten.unbind.int), drop),
    aten.cat.default: cat,
    aten.stack.default: stack,
    aten.select_scatter.default: select_scatter,
    aten.slice_backward.default: slice_backward,
    aten.select_backward.default: select_backward,
    **dict.fromkeys((aten.flip.default, aten.roll.default), flip),
    aten.constant_pad_nd.default: pad,
    **dict.fromkeys((aten.tril.default, aten.triu.default), lower_or_upper),
    **dict.fromkeys((aten._fft_r2c.default, aten._fft_c2c.default, aten._fft_c2r.default), fourier),
    **dict.fromkeys((aten.view_as_real.default, aten.view_as_complex.default), complex_pair),
}
