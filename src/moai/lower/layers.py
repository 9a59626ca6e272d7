"""Where the forward is cut, so that the backward can compute it again part by part.

In: the `Activations` of a step. Out: the first steps of the parts. Layers are found by what they compute: a sequence of
operators on tensors of the same types that comes again and again, cut where the fewest bytes cross.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate

from moai.lower.activations import Activations

# How many of the distances at which operators come again are looked at: layers, and layers within layers.
_PERIODS = 8
# The length of the sequences of operators whose next occurrence is looked for.
_GRAM = 4
# Layers are what a reader expects and what compiles once; parts of other sizes have to hold so much less than these.
_WORTH_LEAVING_LAYERS = 1.5


def cuts(activations: Activations, block: Sequence[int]) -> list[int]:
    """The steps of `block` that begin a part, but for the first: none if that would not save memory."""
    stretch = _Stretch(activations, block)
    if not stretch.held([]):
        return []
    even = min((stretch.even(k) for k in _part_counts(len(block))), key=stretch.held, default=[])
    found = stretch.layers()
    if stretch.held(found) > _WORTH_LEAVING_LAYERS * stretch.held(even):
        found = even
    return [block[p] for p in found] if stretch.held(found) < stretch.held([]) else []


def _part_counts(n: int) -> list[int]:
    """2, 3, 4, 6, 8, 12, ...: up to a few times the square root of `n`, the optimum for `n` alike."""
    most = min(n, 4 * math.isqrt(n))
    return sorted({k for e in range(most.bit_length()) for k in (2 << e, 3 << e) if k <= most})


class _Stretch:
    """One block. Positions count its steps; a cut at position p separates step p - 1 from step p."""

    def __init__(self, activations: Activations, block: Sequence[int]):
        self._n = len(block)
        self._spans = _spans(activations, block)  # (made at, last read at, bytes, whether the backward reads it)
        changes = [0] * (self._n + 2)
        saved = [0] * (self._n + 1)
        for born, last, nbytes, is_saved in self._spans:
            changes[born + 1] += nbytes
            changes[last + 1] -= nbytes
            saved[born + 1] += nbytes * is_saved
        self._crossing = list(accumulate(changes))[: self._n + 1]  # bytes that a cut at each position would keep
        self._saved = list(accumulate(saved))  # bytes that the backward reads of what was made before each position
        self._tokens = _tokens(activations, block)

    def held(self, at: Sequence[int]) -> int:
        """The most bytes of activations held at a time with cuts `at`: what crosses them, and one part's own."""
        kept, own = [0] * (len(at) + 1), [0] * (len(at) + 1)
        for born, last, nbytes, is_saved in self._spans:
            part = bisect_right(at, born)
            if part < len(at) and at[part] <= last:
                kept[part] += nbytes
            elif is_saved:
                own[part] += nbytes
        return max(k + o for k, o in zip(accumulate(kept), own, strict=True))

    def layers(self) -> list[int]:
        """The first steps of repeated layers. Runs of several kinds of layers may follow each other."""
        found: list[int] = []
        taken: list[tuple[int, int]] = []
        for period, runs in self._repetitions():
            free = [(a, b) for a, b in runs if all(b <= c or d <= a for c, d in taken)]
            more = sorted({*found, *(p for run in free for p in self._narrowest(*run, period))})
            if self.held(more) < self.held(found):
                found = more
                taken += free
        return found

    def even(self, parts: int) -> list[int]:
        """Cuts for `parts` parts with about the same bytes for the backward, near by where few bytes cross."""
        quota = self._saved[-1] / parts
        found = set()
        for k in range(1, parts):
            low = bisect_left(self._saved, (k - 0.5) * quota)
            high = bisect_right(self._saved, (k + 0.5) * quota)
            window = range(max(low, 1), min(high, self._n))
            if window:
                found.add(min(window, key=self._crossing.__getitem__))
        return sorted(found)

    def _repetitions(self) -> list[tuple[int, list[tuple[int, int]]]]:
        """Periods with the stretches in which every step comes again after one, those that cover most first."""
        tokens = self._tokens
        distances: Counter[int] = Counter()
        seen: dict[tuple[int, ...], int] = {}
        for i, gram in enumerate(zip(*(tokens[k:] for k in range(_GRAM)), strict=False)):
            if gram in seen:
                distances[i - seen[gram]] += 1
            seen[gram] = i
        found = [(period, self._runs(period)) for period, _ in distances.most_common(_PERIODS)]
        return sorted(found, key=lambda pair: (-sum(b - a for a, b in pair[1]), pair[0]))

    def _runs(self, period: int) -> list[tuple[int, int]]:
        tokens, runs, start = self._tokens, [], 0
        alike = [a == b for a, b in zip(tokens, tokens[period:], strict=False)]
        for i, same in enumerate([*alike, False]):
            if not same:
                if i - start >= period:
                    runs.append((start, i + period))
                start = i + 1
        return runs

    def _narrowest(self, start: int, end: int, period: int) -> list[int]:
        """The cuts, one period apart, of which the widest is crossed by the fewest bytes; of several, the first."""
        inside = range(1, self._n)
        choices = [[p for p in range(start + o, end + 1, period) if p in inside] for o in range(period)]
        return min(filter(None, choices), key=lambda at: max(self._crossing[p] for p in at))


def _spans(activations: Activations, block: Sequence[int]) -> list[tuple[int, int, int, bool]]:
    """What the block makes and somebody has to decide about. What a later block reads is not: it stays."""
    position = {step: p for p, step in enumerate(block)}
    found = []
    for p, step in enumerate(block):
        for v in activations.makes[step]:
            last = activations.last_forward.get(v, step)
            if v not in activations.alive and activations.root[v] == v and last <= block[-1]:
                last_position = position.get(last)
                if last_position is None:  # a view reads it last
                    last_position = bisect_right(block, last) - 1
                found.append((p, last_position, activations.types[v].nbytes, v in activations.saved))
    return found


def _tokens(activations: Activations, block: Sequence[int]) -> list[int]:
    """A number for each step, the same for the same operator on the same types."""
    names: dict[object, int] = {}
    of_types: dict[object, int] = {}
    types = activations.types

    def kind(v: int) -> int:
        return of_types.setdefault(types[v], len(of_types))

    return [
        names.setdefault(
            (activations.nodes[i].op, *map(kind, activations.reads[i]), *map(kind, activations.makes[i])), len(names)
        )
        for i in block
    ]
