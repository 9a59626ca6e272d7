"""A graph or a program whose layers are known, to be written with more layers or fewer.

In: its inputs, Python numbers, records and outputs. Out: a `Layered`, and from it a `Version` of any depth.
"""

from __future__ import annotations

import sys
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from moai.lower.depth.pattern import Copies, Entry, Pattern, Run, Strip, entries, run_of, runs
from moai.lower.depth.records import Lists, Maker, Numbers, Record, Writer, has_lists

T = TypeVar("T")
# Strips: these, and behind them the lists of records.
_INPUTS, _SCALARS, _RECORDS, _OUTPUTS, _FIXED = range(5)
# Lists of operators that are not repeated themselves: what is one entry a layer may be in pieces.
_FEW = 3


@dataclass(frozen=True)
class Whole:
    """`inputs`: ids, with what each is. `outputs`: what each is, its id, and the position of the input it replaces.
    `most_values`: there are no more."""

    inputs: Sequence[tuple[int, Hashable]]
    n_scalars: int
    records: Sequence[Record]
    outputs: Sequence[tuple[Hashable, int, int | None]]
    most_values: int


@dataclass(frozen=True)
class Version(Generic[T]):
    """A whole of another depth, with what was built of its records. Values are numbered in the order in which they are
    made, inputs first. Inputs and outputs are given as the positions of those that they are like; with outputs go their
    numbers, and the positions of the inputs they replace."""

    inputs: list[int]
    n_scalars: int
    records: list[T]
    outputs: list[tuple[int, int, int | None]]
    strips: Sequence[Sequence[Entry | Copies]]


@dataclass(frozen=True)
class Layers:
    """Which inputs belong to layers: `count` times `period` of them from `start`, of which `weight` come with a unit of
    depth."""

    start: int
    period: int
    count: int
    weight: int


class Layered:
    """A whole with the pattern of its layers. `units`: its depth, where a unit is the least that can be added."""

    def __init__(self, whole: Whole, ids: Sequence[int], lists: Mapping[int, Lists], pattern: Pattern) -> None:
        """`ids`: of values, by number."""
        self._whole = whole
        self._ids = ids
        self._lists = lists
        self._pattern = pattern

    @property
    def units(self) -> int:
        return min(run.count // weight for run, weight in self._pattern.weights.items())

    def inputs(self, deeper: int) -> list[Layers]:
        """The layers among the inputs of a version."""
        found, grown = [], 0
        for run in self._pattern.runs[_INPUTS]:
            weight = self._pattern.weights[run]
            found.append(Layers(run.start + grown, run.period, run.count + weight * deeper, weight))
            grown += weight * deeper * run.period
        return found

    def version(self, deeper: int, maker: Maker[T]) -> Version[T]:
        """This, with so many more units of depth, or fewer where negative."""
        strips = self._pattern.version(deeper)
        inputs, numerals, outputs = map(entries, (strips[k] for k in (_INPUTS, _SCALARS, _OUTPUTS)))
        lists = map(entries, strips[_FIXED:])
        writer = Writer(self._whole.records, numerals[0][1][0] if numerals else sys.maxsize, maker)
        out: list[T] = []
        for part in strips[_RECORDS]:
            if isinstance(part, Copies):
                out += writer.copies(part)
                continue
            at, numbers = part
            found = self._lists.get(at)
            if found is None:
                out.append(writer.one(at, numbers))
            else:
                out.append(found.written(at, writer, numbers, [next(lists) for _ in found.groups]))
        replaced = [(at, n[0], n[1] if len(n) > 1 else None) for at, n in outputs]
        return Version([at for at, _ in inputs], len(numerals), out, replaced, strips)

    def positions(self, deeper: int) -> list[int]:
        """Where each record is in that version. Repeated ones stay as far from where their layers begin, or end."""
        return self._pattern.positions(_RECORDS, deeper)

    def like(self, version: Version[T]) -> dict[int, int]:
        """For each value of a version, the id of the one here that it is like."""
        like: dict[int, int] = {}
        for strip, parts in zip(self._pattern.strips, version.strips, strict=True):
            for part in parts:
                if isinstance(part, Copies):
                    old = [n for at in part.elements for n in strip.numbers[at]]
                    for column, number in zip(part.columns(), old, strict=True):
                        like.update(dict.fromkeys(column, number))
                else:
                    at, numbers = part
                    like.update(zip(numbers, strip.numbers[at], strict=True))
        return {new: self._ids[old] for new, old in like.items() if old < len(self._ids)}


def layered(whole: Whole, least: int, known: Sequence[Layers] | None = None) -> Layered | None:
    """The layers of `whole`, if they come `least` times or more and it is clear how all of it follows from them.

    `known`: which inputs belong to them. Without it, the longest repeated part of the records is one unit a copy.
    """
    numbers = Numbers((id_ for id_, _ in whole.inputs), whole.most_values)
    strips = _strips(whole, numbers)
    found = [runs(strip, least) for strip in strips]
    if known is None:
        longest = max(found[_RECORDS], key=lambda run: run.period * run.count, default=None)
        anchors = {} if longest is None else {longest: 1}
    else:
        given = [(run_of(strips[_INPUTS], k.start, k.period, k.start + k.period * k.count), k.weight) for k in known]
        anchors = {run: weight for run, weight in given if run is not None}
        found[_INPUTS] = list(anchors)
    pattern = Pattern.of(strips, found, anchors) if anchors else None
    if pattern is None:
        return None
    # What hangs together with the layers by lists alone is a run if it has none itself: what fills new states, or what
    # writes into a message.
    depth = min(run.count for run in anchors)
    found[_RECORDS] = [r for r in found[_RECORDS] if r in pattern.weights or not _have_lists(whole.records, r, depth)]
    lists = _lists(whole.records, found[_RECORDS], numbers)
    strips[_RECORDS] = _without_lists(strips[_RECORDS], lists)
    labels = _Labels(numbers.scalars + whole.n_scalars)
    for strip, each in zip(strips, found, strict=True):
        labels.mark(strip, each)
    for some in lists.values():
        for strip in some.strips(labels.of.__getitem__):
            strips.append(strip)
            found.append(runs(strip, min(least, _FEW)))
            labels.mark(strip, found[-1])
    pattern = Pattern.of(strips, found, anchors)
    if pattern is None or not pattern.is_clear() or any(pattern.weights[r] != w for r, w in anchors.items() if known):
        return None
    return Layered(whole, list(numbers.of), lists, pattern)


def _strips(whole: Whole, numbers: Numbers) -> list[Strip]:
    """Of inputs, Python numbers, records and outputs."""
    tokens: dict[Hashable, int] = {}
    records = numbers.strip(whole.records)
    results = [(numbers.of[id_],) if k is None else (numbers.of[id_], k) for _, id_, k in whole.outputs]
    return [
        _givens([tokens.setdefault(what, len(tokens)) for _, what in whole.inputs], 0),
        _givens([numbers.users.get(k) for k in range(whole.n_scalars)], numbers.scalars),
        records,
        Strip([tokens.setdefault((what, k is None), len(tokens)) for what, _, k in whole.outputs], results),
    ]


def _givens(tokens: Sequence[Hashable], first: int) -> Strip:
    behind = first + len(tokens)
    return Strip(tokens, [(n,) for n in range(first, behind)], (range(first, behind + 1),))


def _lists(records: Sequence[Record], repeated: Sequence[Run], numbers: Numbers) -> dict[int, Lists]:
    """The long lists of what is not repeated, by the record's position."""
    bounds = [0, *(bound for run in repeated for bound in (run.start, run.end)), len(records)]
    still = zip(bounds[::2], bounds[1::2], strict=True)
    found = {
        at: Lists(record, numbers)
        for start, end in still
        for at, record in enumerate(records[start:end], start)
        if has_lists(record)
    }
    return {at: lists for at, lists in found.items() if lists.groups}


def _have_lists(records: Sequence[Record], run: Run, depth: int) -> bool:
    """Whether there are lists with an entry for each layer."""
    each = (r._replace(frees=()) for r in records[run.start : run.start + run.period])
    return any(has_lists(record, depth) for record in each)


def _without_lists(strip: Strip, lists: Mapping[int, Lists]) -> Strip:
    numbers = list(strip.numbers)
    for at, found in lists.items():
        numbers[at] = found.rest
    return replace(strip, numbers=numbers)


class _Labels:
    """By number: a label that the same value of every layer has, and no other one."""

    def __init__(self, n: int) -> None:
        self.of = list(range(n))
        self._next = n

    def mark(self, strip: Strip, found: Sequence[Run]) -> None:
        """Label what the copies of runs make."""
        for run in found:
            for column in strip.makes:
                first, end = column[run.start], column[run.end]
                each = column[run.start + run.period] - first
                labels = list(range(self._next, self._next + each)) * (run.count + 1)
                self.of[first:end] = labels[: end - first]
                self._next += each
