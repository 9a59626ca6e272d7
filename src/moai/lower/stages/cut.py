"""Where the forward is cut into stages.

In: the forward's steps in the script's order, each with what it takes; how much would be sent if it was cut before each
of them. Out: the first step of every stage but the first.

Where layers repeat, cuts are between them. Elsewhere stages take equally long, as far as they can where little is sent:
places where more crosses are looked at only if the slowest stage gains much by it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch

from moai.lower.repeats import Stretch, apart

# How much slower the slowest stage may be for the sake of cuts that less crosses.
_SLOWER = 1.2


@dataclass(frozen=True, slots=True)
class Layers:
    """Parts that do the same again and again: how many there are, and, if all are of one kind, the first step of each
    but the first: what comes before the layers goes with that one, what comes behind with the last."""

    count: int
    begins: tuple[int, ...] | None

    def cuts(self, dealt: Sequence[int]) -> list[int]:
        """The first steps of stages that have so many layers each."""
        assert self.begins is not None and sum(dealt) == self.count
        return [self.begins[behind - 1] for behind in accumulate(dealt[:-1])]

    def even(self, seconds: Sequence[float], stages: int) -> list[int] | None:
        """How many layers each stage has, so that the slowest is as fast as can be. None: there are not enough."""
        assert self.begins is not None
        found = _even(seconds, self.begins, stages)
        if found is None:
            return None
        ends = [*(self.begins.index(cut) + 1 for cut in found[1]), self.count]
        return [end - begin for begin, end in zip([0, *ends], ends, strict=False)]


def balanced(seconds: Sequence[float], crossing: Sequence[int], stages: int) -> list[int] | None:
    """`seconds`: of each step. `crossing[k]`: bytes that are sent if step k begins a stage. None: there are not enough
    steps that take time."""
    places = _places(seconds, crossing)
    best = _even(seconds, places, stages)
    if best is None:
        return None
    for limit in sorted({crossing[p] for p in places}):
        few = [p for p in places if crossing[p] <= limit]
        found = _even(seconds, few, stages)
        if found is not None and found[0] <= best[0] * _SLOWER:
            return found[1]
    return best[1]


def layers_of(steps: Sequence[Hashable], crossing: Sequence[int]) -> Layers | None:
    """The layers of the forward, which begin where least crosses. `steps`: what each is. None if most of it does not
    repeat."""
    found = apart(steps, 2)
    if 2 * sum(s.end - s.start for s in found) < len(steps):
        return None
    longest = max(s.end - s.start for s in found)
    kinds = [s for s in found if 2 * (s.end - s.start) >= longest]
    if len(kinds) > 1:  # the last layer may end otherwise than the others
        return Layers(sum(round((s.end - s.start) / s.period) for s in kinds), None)
    begins = _begins(kinds[0], crossing)
    return Layers(len(begins) + 1, begins)


def _begins(stretch: Stretch, crossing: Sequence[int]) -> tuple[int, ...]:
    """Of places one period apart, those whose widest is crossed by the least: of several, the first. At both ends half
    a layer at least is left, or it is none."""
    half = stretch.period / 2

    def places(offset: int) -> list[int]:
        found = range(stretch.start + offset, stretch.end, stretch.period)
        return [p for p in found if stretch.start + half <= p <= stretch.end - half]

    offsets = filter(places, range(stretch.period))
    best = min(offsets, key=lambda offset: max(crossing[p] for p in places(offset)))
    return tuple(places(best))


def _places(seconds: Sequence[float], crossing: Sequence[int]) -> list[int]:
    """Of places with nothing to do in between, the one that least crosses. Something is to be done on both sides."""
    found: list[int] = []
    total, done, last = sum(seconds), 0.0, 0.0
    for at, (own, sent) in enumerate(zip(seconds, crossing, strict=True)):
        if 0.0 < done < total:
            if not found or done > last:
                found.append(at)
                last = done
            elif sent <= crossing[found[-1]]:
                found[-1] = at
        done += own
    return found


def _even(seconds: Sequence[float], places: Sequence[int], stages: int) -> tuple[float, list[int]] | None:
    """The shortest time that the slowest stage can take with cuts at some of `places`, and these cuts."""
    if len(places) < stages - 1:
        return None
    sums = torch.tensor([0.0, *accumulate(seconds)], dtype=torch.float64)
    ends = [0, *places, len(seconds)]
    done = sums[ends]
    # slowest[j]: of the stages so far, the last of which ends at ends[j]
    slowest = torch.where(torch.arange(len(ends)) == 0, 0.0, torch.inf).double()
    choices = []
    apart = (done[None, :] - done[:, None]).masked_fill(~torch.ones(len(ends), len(ends)).triu(1).bool(), torch.inf)
    for _ in range(stages):
        slowest, chosen = torch.maximum(slowest[:, None], apart).min(0)
        choices.append(chosen)
    at, cuts = len(ends) - 1, []
    for chosen in reversed(choices):
        at = int(chosen[at])
        cuts.append(ends[at])
    return float(slowest[-1]), cuts[-2::-1]
