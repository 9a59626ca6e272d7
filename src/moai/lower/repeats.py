"""Where a sequence says the same again and again.

In: a sequence of tokens. Out: its periods, and the stretches that repeat with them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from operator import eq

# How many of the distances at which tokens come again are looked at: layers, and layers within layers.
_PERIODS = 8
# The length of the sequences of tokens whose next occurrence is looked for.
_GRAM = 4
# A stretch is short that is so many times shorter than another one.
_SHORT = 4


@dataclass(frozen=True, slots=True)
class Stretch:
    """Tokens from `start` to before `end`, two periods or more: each comes again after `period`, but for the last."""

    start: int
    end: int
    period: int

    @property
    def count(self) -> int:
        return (self.end - self.start) // self.period


def periods(tokens: Sequence[Hashable]) -> list[tuple[int, list[Stretch]]]:
    """Periods with the stretches that have them, those that cover most first."""
    grams = zip(*(tokens[k:] for k in range(_GRAM)), strict=False)
    first: dict[tuple[Hashable, ...], int] = {}
    latest = list(range(len(tokens)))
    distances = []
    for i, found in enumerate(map(first.setdefault, grams, count())):
        distances.append(i - latest[found])
        latest[found] = i
    common = [distance for distance, _ in Counter(distances).most_common(_PERIODS + 1) if distance]
    stretches = [(period, _stretches(tokens, period)) for period in common[:_PERIODS]]
    return sorted(stretches, key=lambda pair: (-sum(s.end - s.start for s in pair[1]), pair[0]))


def apart(tokens: Sequence[Hashable], least: int) -> list[Stretch]:
    """Stretches of `least` periods or more that do not overlap, in order. The longest ones come first, with their
    shortest periods, and then what there is between them."""
    if len(tokens) < least:
        return []
    found = [s for _, stretches in periods(tokens) for s in stretches if s.count >= least]
    longest = max((s.end - s.start for s in found), default=0)
    taken: list[Stretch] = []
    for stretch in sorted(found, key=lambda s: (s.start - s.end, s.period)):
        # Of short ones the true periods may be rarer than those that were looked at: these get a second look.
        is_long = (stretch.end - stretch.start) * _SHORT > longest
        if is_long and all(stretch.end <= t.start or t.end <= stretch.start for t in taken):
            taken.append(stretch)
    if not taken:
        return []
    taken.sort(key=lambda s: s.start)
    bounds = [0, *(bound for s in taken for bound in (s.start, s.end)), len(tokens)]
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        taken += [Stretch(s.start + start, s.end + start, s.period) for s in apart(tokens[start:end], least)]
    return sorted(taken, key=lambda s: s.start)


def _stretches(tokens: Sequence[Hashable], period: int) -> list[Stretch]:
    alike = bytes(map(eq, tokens, tokens[period:]))  # searched as text, which is faster than a loop
    found = re.finditer(b"\x01{%d,}" % period, alike)
    return [Stretch(m.start(), m.end() + period, period) for m in found]
