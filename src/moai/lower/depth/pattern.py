"""What a sequence with repeated layers would be if it had more of them, or fewer.

In: strips of elements, each with a token (what it is) and numbers (the values that it uses and makes; values are
numbered in the order in which they are made). Out: for every strip, which element stands where in a deeper or
shallower version, and with which numbers.

A `Run` is a part of a strip that repeats: copies whose tokens agree, and in which every number grows by the same
amount from one copy to the next, the first and last few copies aside. Those amounts say how runs hang together: a
number that grows by what a copy of a run makes follows that run layer by layer, and one that shrinks follows it from
its end. Nothing is assumed about order, or about what layers are. What does not fit is no run, and where a part that
stands still uses a layer in the middle it is not clear what it would use in another version.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, chain, islice, pairwise, repeat
from math import lcm
from operator import sub
from typing import TypeVar

from moai.lower.repeats import Stretch, apart

T = TypeVar("T")
# At each end, so many copies may differ in what they use: the first layer reads the embedding, the last feeds the head.
_EDGE = 2
# What stands still uses copies that are so near to an end that there is no doubt whether they go with the first layer
# or with the last.
_NEAR = 2
# So many copies in the middle have to agree in how their numbers grow.
_ALIKE = 3
# A copy may span several periods of the tokens: tensors alike may belong to layers that alternate.
_MULTIPLES = (1, 2, 3, 4, 6, 8)


@dataclass(frozen=True)
class Strip:
    """Elements in order: `tokens[e]`, `numbers[e]`. `makes` are columns: column[e] is the number of the first value
    that element e makes in it, and column[-1] what follows behind the last."""

    tokens: Sequence[Hashable]
    numbers: Sequence[Sequence[int]]
    makes: Sequence[Sequence[int]] = ()


# Which element of a strip stands somewhere in another version, and with which numbers.
Entry = tuple[int, Sequence[int]]


@dataclass(frozen=True)
class Copies:
    """Copies of `elements` that follow each other in another version, one for each of `steps`: there, the numbers of an
    element are those of `base` between its two `bounds`, moved by `strides` for each step."""

    elements: range
    bounds: Sequence[tuple[int, int]]
    base: Sequence[int]
    strides: Sequence[int]
    steps: range

    def columns(self) -> list[Iterable[int]]:
        """The numbers of every copy: of the first number of each copy, of the second, and so on."""
        first, end, n = self.steps.start, self.steps.stop, len(self.steps)
        moved = zip(self.base, self.strides, strict=True)
        return [range(b + s * first, b + s * end, s) if s else repeat(b, n) for b, s in moved]

    def entries(self) -> Iterator[Entry]:
        columns, n = self.columns(), len(self.steps)
        each = zip(self.elements, self.bounds, strict=True)
        return interleaved(
            [zip(repeat(e, n), together(columns[begin:end], n), strict=True) for e, (begin, end) in each]
        )


def together(columns: Sequence[Iterable[T]], n: int) -> Iterable[tuple[T, ...]]:
    """The first entries of all columns, then the second ones, and so on; there are `n` of each."""
    return zip(*columns, strict=True) if columns else repeat((), n)


def interleaved(columns: Sequence[Iterable[T]]) -> Iterator[T]:
    """The same, all in a row."""
    return chain.from_iterable(zip(*columns, strict=True))


def entries(parts: Iterable[Entry | Copies]) -> list[Entry]:
    """All entries, one after the other."""
    return [e for part in parts for e in (part.entries() if isinstance(part, Copies) else (part,))]


@dataclass(frozen=True, eq=False)
class Run:
    """`count` copies of `period` elements from `start` of a strip, and behind them the first `extra` elements of one
    more. Copies `low` to before `high` are alike: their numbers, all in a row, are `base` in copy `low`, and grow by
    `strides`."""

    start: int
    period: int
    count: int
    low: int
    high: int
    base: Sequence[int]
    strides: Sequence[int]
    extra: int

    @property
    def end(self) -> int:
        return self.start + self.period * self.count + self.extra

    def copy(self, k: int) -> range:
        """The elements of a copy, or of what there is of the last one."""
        return range(self.start + k * self.period, min(self.start + (k + 1) * self.period, self.end))

    @property
    def half_way(self) -> list[int]:
        """The numbers of a copy in the middle. These are made by other copies in the middle, also where those of the
        first one are made by what is left of a copy at the end of its run."""
        steps = (self.high - self.low) // 2
        return [b + s * steps for b, s in zip(self.base, self.strides, strict=True)]


def runs(strip: Strip, least: int) -> list[Run]:
    """The parts of `strip` that repeat `least` times or more."""
    found = []
    for stretch in apart(strip.tokens, least):
        tried = (
            run_of(strip, stretch.start, stretch.period * m, stretch.end)
            for m in _MULTIPLES
            if stretch.count // m >= least and _goes_on(strip, stretch, m)
        )
        found += list(islice((run for run in tried if run is not None), 1))
    return found


def _goes_on(strip: Strip, stretch: Stretch, multiple: int) -> bool:
    """Whether neighbours half way, copies of so many periods, are alike; a quick look."""
    each, count = stretch.period * multiple, stretch.count // multiple
    first = max((count - 1) // 2 - 1, 0)
    near = [_numbers(strip, stretch.start + k * each, each) for k in range(first, min(first + 4, count))]
    growth = [[y - x for x, y in zip(a, b, strict=False)] for a, b in pairwise(near)]
    return any(a == b for a, b in pairwise(growth))


def run_of(strip: Strip, start: int, period: int, end: int) -> Run | None:
    """The run of the copies from `start` to before `end`, if their numbers grow evenly."""
    count, extra = divmod(end - start, period)
    if count < _ALIKE:
        return None
    copies = [_numbers(strip, start + k * period, period) for k in range(count)]
    if len(set(map(len, copies))) > 1:
        return None
    growth = [list(map(sub, b, a)) for a, b in pairwise(copies)]
    low = high = (count - 1) // 2
    strides = growth[low]
    while low and growth[low - 1] == strides:
        low -= 1
    while high < count - 1 and growth[high] == strides:
        high += 1
    if low > _EDGE or count - 1 - high > _EDGE or high - low + 1 < _ALIKE:
        return None
    return Run(start, period, count, low, high + 1, copies[low], strides, extra)


def _numbers(strip: Strip, start: int, n: int) -> list[int]:
    return list(chain.from_iterable(strip.numbers[start : start + n]))


@dataclass(frozen=True, eq=False)
class _Track:
    """What the copies of a run make: `each` numbers a copy, from `first`."""

    run: Run
    first: int
    each: int

    @property
    def end(self) -> int:
        return self.first + self.each * self.run.count


class Pattern:
    """Strips with their runs. `weights`: the copies that each run gains when the whole gets a layer deeper."""

    def __init__(
        self, strips: Sequence[Strip], found: Sequence[Sequence[Run]], weights: Mapping[Run, int], whole: bool
    ) -> None:
        """`whole`: whether the runs use no others."""
        self._is_whole = whole
        self.strips = strips
        self.runs = found
        self.weights = weights
        self._tracks = _tracks(strips, found)
        self._firsts = [t.first for t in self._tracks]

    @staticmethod
    def of(strips: Sequence[Strip], found: Sequence[Sequence[Run]], anchors: Mapping[Run, int]) -> Pattern | None:
        """The pattern of the runs that hang together with `anchors`, whose weights are given; the others stand still.
        None where runs contradict each other."""
        ties = _ties(_tracks(strips, found), found)
        weights = _weights(ties, anchors)
        if weights is None:
            return None
        whole = all(run in ties and ties[run].keys() <= weights.keys() for run in weights)
        return Pattern(strips, [[run for run in each if run in weights] for each in found], weights, whole)

    def is_clear(self) -> bool:
        """Whether the runs use no others, and all that stands still follows the first layers or the last ones, none in
        the middle."""
        deep = all(run.count > 2 * self._near(run) for run in self.weights)
        return deep and self._is_whole and not any(self._is_inside(number) for number in self._still())

    def version(self, deeper: int) -> list[list[Entry | Copies]]:
        """Of each strip: which element of this version stands there in the one `deeper` layers deeper (shallower where
        negative), and with which numbers."""
        moved = _Moved(self._tracks, self._growth(deeper))
        return [self._strip(k, deeper, moved) for k in range(len(self.strips))]

    def positions(self, k: int, deeper: int) -> list[int]:
        """Where each element of strip `k` is in the version that is `deeper` layers deeper: copies in the first half of
        a run keep their distance to its begin, those in the second half to its end."""
        out: list[int] = []
        grown = 0
        for run in self.runs[k]:
            half = run.start + run.period * (run.count // 2)
            out += range(len(out) + grown, half + grown)
            grown += run.period * self.weights[run] * deeper
        return [*out, *range(len(out) + grown, len(self.strips[k].tokens) + grown)]

    def _growth(self, deeper: int) -> Callable[[_Track], int]:
        return lambda track: self.weights[track.run] * deeper * track.each

    def _strip(self, k: int, deeper: int, moved: _Moved) -> list[Entry | Copies]:
        strip, at = self.strips[k], 0
        out: list[Entry | Copies] = []
        for run in self.runs[k]:
            out += [(e, moved.all(strip.numbers[e])) for e in range(at, run.start)]
            out += self._copies(strip, run, self.weights[run] * deeper, moved)
            at = run.end
        return out + [(e, moved.all(strip.numbers[e])) for e in range(at, len(strip.tokens))]

    def _copies(self, strip: Strip, run: Run, more: int, moved: _Moved) -> Iterator[Entry | Copies]:
        base = list(map(moved.first, run.base, run.strides, run.half_way))
        widths = map(len, strip.numbers[run.start : run.start + run.period])
        bounds = list(pairwise(accumulate(widths, initial=0)))

        def edge(copy: int) -> Iterator[Entry]:
            steps = copy - run.low + (more if copy >= run.high else 0)
            numbers = [b + s * steps for b, s in zip(base, run.strides, strict=True)]
            for column, number in _odd(strip, run, copy):
                numbers[column] = moved.one(number)
            yield from ((element, numbers[b:e]) for element, (b, e) in zip(run.copy(copy), bounds, strict=False))

        for copy in range(run.low):
            yield from edge(copy)
        yield Copies(run.copy(run.low), bounds, base, run.strides, range(run.high + more - run.low))
        for copy in range(run.high, run.count + 1):
            yield from edge(copy)

    def _still(self) -> Iterator[int]:
        for strip, found in zip(self.strips, self.runs, strict=True):
            at = 0
            for run in found:
                yield from _numbers(strip, at, run.start - at)
                yield from (n for n, stride in zip(run.base, run.strides, strict=True) if not stride)
                edges = (*range(run.low), *range(run.high, run.count + 1))
                yield from (number for copy in edges for _, number in _odd(strip, run, copy))
                at = run.end
            yield from _numbers(strip, at, len(strip.tokens) - at)

    def _near(self, run: Run) -> int:
        """So many copies from an end are near to it: one layer's, in a run of so few that both ends share the rest."""
        weight = self.weights[run]
        return _NEAR * weight if run.count > 2 * _NEAR * weight else weight

    def _is_inside(self, number: int) -> bool:
        k = bisect_right(self._firsts, number) - 1
        if k < 0 or number >= self._tracks[k].end:
            return False
        track = self._tracks[k]
        edge = self._near(track.run)
        return edge <= (number - track.first) // track.each < track.run.count - edge


def _odd(strip: Strip, run: Run, copy: int) -> list[tuple[int, int]]:
    """Columns, with their numbers, in which a copy at the edge is not like the others."""
    elements = run.copy(copy)
    own = _numbers(strip, elements.start, len(elements))
    expected = (b + s * (copy - run.low) for b, s in zip(run.base, run.strides, strict=True))
    return [(column, n) for column, (n, e) in enumerate(zip(own, expected, strict=False)) if n != e]


def _tracks(strips: Sequence[Strip], found: Sequence[Sequence[Run]]) -> list[_Track]:
    tracks = [
        _Track(run, column[run.start], column[run.start + run.period] - column[run.start])
        for strip, each in zip(strips, found, strict=True)
        for run in each
        for column in strip.makes
    ]
    return sorted((t for t in tracks if t.each), key=lambda t: t.first)


def _ties(tracks: Sequence[_Track], found: Sequence[Sequence[Run]]) -> dict[Run, dict[Run, Fraction]]:
    """How many copies of other runs go with one of each. Runs that do not say so with one voice are left out."""
    firsts = [t.first for t in tracks]
    ties: dict[Run, dict[Run, Fraction]] = {}
    for run in chain.from_iterable(found):
        own: dict[Run, set[tuple[int, int]]] = defaultdict(set)
        lost = False
        for number, stride in set(zip(run.half_way, run.strides, strict=True)):
            k = bisect_right(firsts, number) - 1
            if stride and k >= 0 and number < tracks[k].end:
                own[tracks[k].run].add((abs(stride), tracks[k].each))
            elif stride:
                lost = True
        ratios = {other: {Fraction(*pair) for pair in pairs} for other, pairs in own.items()}
        if not lost and all(len(found) == 1 for found in ratios.values()) and ratios.get(run, {1}) == {1}:
            ties[run] = {other: ratio for other, (ratio,) in ratios.items()}
    return ties


def _weights(ties: Mapping[Run, Mapping[Run, Fraction]], anchors: Mapping[Run, int]) -> dict[Run, int] | None:
    """Weights of `anchors` and of all that hangs together with them; None if these contradict each other."""
    both: dict[Run, list[tuple[Run, Fraction]]] = defaultdict(list)
    for run, others in ties.items():
        for other in ties.keys() & others.keys():
            both[run].append((other, others[other]))
            both[other].append((run, 1 / others[other]))
    weights = {run: Fraction(weight) for run, weight in anchors.items()}
    waiting = list(weights)
    while waiting:
        run = waiting.pop()
        for other, ratio in both[run]:
            if other not in weights:
                waiting.append(other)
            if weights.setdefault(other, weights[run] * ratio) != weights[run] * ratio:
                return None
    unit = lcm(*(w.denominator for w in weights.values()))
    return {run: int(w * unit) for run, w in weights.items()}


class _Moved:
    """Where the numbers of a version are in the deeper one."""

    def __init__(self, tracks: Sequence[_Track], growth: Callable[[_Track], int]) -> None:
        self._tracks = tracks
        self._firsts = [t.first for t in tracks]
        self._grown = [growth(t) for t in tracks]
        self._before = list(accumulate(self._grown, initial=0))

    def all(self, numbers: Iterable[int]) -> list[int]:
        return [self.one(n) for n in numbers]

    def one(self, number: int) -> int:
        """Of what stands still: copies in the second half of a run go with its end."""
        k = bisect_right(self._firsts, number) - 1
        if k < 0:
            return number
        track = self._tracks[k]
        return number + self._before[k + (2 * (number - track.first) >= track.end - track.first)]

    def first(self, number: int, stride: int, later: int) -> int:
        """Of the first of many that grow by `stride`, of which `later` is one: up from a run's begin, or down from its
        end."""
        if not stride:
            return self.one(number)
        k = bisect_right(self._firsts, later) - 1
        return number + self._before[k + (stride < 0)]
