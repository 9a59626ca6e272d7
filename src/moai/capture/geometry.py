"""Views by geometry: how a (size, stride, offset) window onto a dense storage reads as permutes, reshapes and slices.

In: the geometry of a storage's base tensor and of a view of it. Out: a chain of `ViewStep`s that makes the view out of
the base (each of which has an inverse), or None where there is no such chain (overlapping windows,
steps that do not divide). Recording therefore never has to remember which view operators a script called.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

Size = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ViewStep:
    """One invertible step: permute (dims), reshape (size), slice (dim, start, end), select (dim, index), expand (size).
    `size` is the shape after the step."""

    kind: Literal["permute", "reshape", "slice", "select", "expand"]
    args: tuple[Any, ...]
    size: Size


def contiguous_stride(size: Size) -> Size:
    """Row-major strides of `size`, as torch computes them (a dim of length 0 counts as 1)."""
    stride, step = [], 1
    for s in reversed(size):
        stride.append(step)
        step *= max(1, s)
    return tuple(reversed(stride))


def numel(size: Size) -> int:
    """Number of elements."""
    n = 1
    for s in size:
        n *= s
    return n


def span(size: Size, stride: Size) -> int:
    """Number of storage elements between the first and the last element, inclusive; 0 for an empty tensor."""
    if 0 in size:
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(size, stride, strict=True))


@lru_cache(maxsize=100_000)
def view_chain(
    base_size: Size, base_stride: Size, size: Size, stride: Size, offset: int
) -> tuple[ViewStep, ...] | None:
    """The steps from a dense base to the view; None where the view cannot be written that way."""
    if numel(size) == 0 or span(base_size, base_stride) != numel(base_size):
        return None
    steps: list[ViewStep] = []
    lengths = _to_memory_order(base_size, base_stride, steps)
    dims = [(st, n, i) for i, (n, st) in enumerate(zip(size, stride, strict=True)) if n != 1 and st != 0]
    dims.sort(key=lambda d: -d[0])
    window = [(st, n) for st, n, _ in dims]
    levels = _levels(lengths, window, offset)
    if levels is None:
        window = _joined(window)
        levels = _levels(lengths, window, offset)
        if levels is None:
            return None
    _window(lengths, levels, window, offset, steps)
    if len(window) != len(dims):
        _append_reshape(steps, tuple(n for _, n, _ in dims))
    _to_view_order(dims, size, stride, steps)
    return tuple(steps)


def _to_memory_order(size: Size, stride: Size, steps: list[ViewStep]) -> Size:
    """Append the permute that lays the base out row-major, if one is needed; return its lengths."""
    order = sorted(range(len(size)), key=lambda d: (-stride[d] if size[d] != 1 else 0, d))
    ones = [d for d in range(len(size)) if size[d] == 1]
    order = [d for d in order if size[d] != 1]
    if order == sorted(order):
        return size
    dims = (*ones, *order)
    lengths = tuple(size[d] for d in dims)
    steps.append(ViewStep("permute", (dims,), lengths))
    return lengths


def _joined(dims: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The dims with neighbours that follow each other in memory made one: a part of a sequence, seen as an image."""
    joined: list[tuple[int, int]] = []
    for st, n in dims:
        if joined and joined[-1][0] == st * n:
            st, n = st, n * joined.pop()[1]
        joined.append((st, n))
    return joined


def _levels(lengths: Size, dims: list[tuple[int, int]], offset: int) -> list[int] | None:
    """Strides at which to cut the flat base so that every view dim is a range of one cut: the base's own strides
    where they fit, the view's always; descending. None where they do not divide one another."""
    total = numel(lengths)
    wanted = [st for st, _ in dims]
    if len(set(wanted)) != len(wanted):
        return None
    levels = sorted(
        {*wanted, *(st for st, n in zip(contiguous_stride(lengths), lengths, strict=True) if n != 1)}, reverse=True
    )
    while True:
        bad = _first_misfit(total, levels, dims, offset)
        if bad is None:
            return levels
        if bad in wanted or bad not in levels:
            return None
        levels.remove(bad)


def _first_misfit(total: int, levels: list[int], dims: list[tuple[int, int]], offset: int) -> int | None:
    """A level that has to go: one that does not divide its neighbour, or that cuts a view dim in two. `total` stands
    for a misfit that cannot be mended."""
    bounds = [total, *levels]
    wanted = {st for st, _ in dims}
    for upper, lower in itertools.pairwise(bounds):
        if upper % lower:
            return lower if lower not in wanted else upper
    for st, n in dims:
        upper = bounds[bounds.index(st) - 1] if st in levels else total
        start = (offset % upper) // st
        if (start + n) * st > upper:
            return upper
    return None


def _window(lengths: Size, levels: list[int], dims: list[tuple[int, int]], offset: int, steps: list[ViewStep]) -> None:
    """Append the reshape to the levels' lengths, then the slices and selects."""
    total = numel(lengths)
    bounds = [total, *levels]
    shape = [upper // lower for upper, lower in itertools.pairwise(bounds)]
    if not levels or levels[-1] != 1:
        shape.append(levels[-1] if levels else total)
        levels = [*levels, 1]
    if tuple(shape) != lengths:
        steps.append(ViewStep("reshape", (tuple(shape),), tuple(shape)))
    counts = dict(dims)
    dim, rest = 0, offset
    for level, length in zip(levels, list(shape), strict=True):
        start, rest = divmod(rest, level)
        if level not in counts:
            del shape[dim]
            steps.append(ViewStep("select", (dim, start), tuple(shape)))
            continue
        n = counts[level]
        if (start, n) != (0, length):
            shape[dim] = n
            steps.append(ViewStep("slice", (dim, start, start + n), tuple(shape)))
        dim += 1


def _to_view_order(dims: list[tuple[int, int, int]], size: Size, stride: Size, steps: list[ViewStep]) -> None:
    """Append the permute to the view's order of dims, the reshape that inserts its dims of length 1, and the expand."""
    order = [i for _, _, i in dims]
    wanted = sorted(order)
    if order != wanted:
        perm = tuple(order.index(i) for i in wanted)
        steps.append(ViewStep("permute", (perm,), tuple(size[i] for i in wanted)))
    unexpanded = tuple(1 if st == 0 else n for n, st in zip(size, stride, strict=True))
    if len(unexpanded) != len(wanted):
        _append_reshape(steps, unexpanded)
    if unexpanded != size:
        steps.append(ViewStep("expand", (size,), size))


def _append_reshape(steps: list[ViewStep], size: Size) -> None:
    """A reshape to `size`; two in a row are one."""
    if steps and steps[-1].kind == "reshape":
        steps.pop()
    steps.append(ViewStep("reshape", (size,), size))
