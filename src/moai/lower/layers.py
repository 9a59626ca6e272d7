"""Where the forward is cut, so that the backward can compute it again part by part.

In: the `Activations` of a step. Out: the first steps of the parts. Layers are found by what they compute: a sequence of
operators on tensors of the same types that comes again and again, cut where the fewest bytes cross.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from itertools import accumulate

from moai.lower.activations import Activations
from moai.lower.repeats import Stretch, periods

# Layers are what a reader expects and what compiles once; parts of other sizes have to hold so much less than these.
_WORTH_LEAVING_LAYERS = 1.5


def cuts(activations: Activations, block: Sequence[int]) -> list[int]:
    """The steps of `block` that begin a part, but for the first: none if that would not save memory."""
    within = _Block(activations, block)
    if not within.held([]):
        return []
    even = min((within.even(k) for k in _part_counts(len(block))), key=within.held, default=[])
    found = within.layers()
    if within.held(found) > _WORTH_LEAVING_LAYERS * within.held(even):
        found = even
    return [block[p] for p in found] if within.held(found) < within.held([]) else []


def _part_counts(n: int) -> list[int]:
    """2, 3, 4, 6, 8, 12, ...: up to a few times the square root of `n`, the optimum for `n` alike."""
    most = min(n, 4 * math.isqrt(n))
    return sorted({k for e in range(most.bit_length()) for k in (2 << e, 3 << e) if k <= most})


class _Block:
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
        taken: list[Stretch] = []
        for _, stretches in periods(self._tokens):
            free = [s for s in stretches if all(s.end <= t.start or t.end <= s.start for t in taken)]
            more = sorted({*found, *(p for stretch in free for p in self._narrowest(stretch))})
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

    def _narrowest(self, stretch: Stretch) -> list[int]:
        """The cuts, one period apart, of which the widest is crossed by the fewest bytes; of several, the first."""
        inside, step = range(1, self._n), stretch.period
        choices = [[p for p in range(stretch.start + o, stretch.end + 1, step) if p in inside] for o in range(step)]
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
