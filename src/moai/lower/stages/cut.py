"""Where the forward is cut into stages.

In: the forward's steps in the script's order, each with what it takes; how much would be sent if it was cut before each
of them. Out: the first step of every stage but the first.

Stages take equally long, as far as they can where little is sent: places where more crosses are looked at only if the
slowest stage gains much by it.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import accumulate

import torch

from moai.lower.repeats import apart

# How much slower the slowest stage may be for the sake of cuts that less crosses.
_SLOWER = 1.2


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


def count_layers(steps: Sequence[Hashable]) -> int | None:
    """How many layers the forward has: parts that do the same again and again. None if most of it does not repeat."""
    found = apart(steps, 2)
    if 2 * sum(s.end - s.start for s in found) < len(steps):
        return None
    longest = max(s.end - s.start for s in found)
    # The last layer may end otherwise than the others.
    return sum(round((s.end - s.start) / s.period) for s in found if 2 * (s.end - s.start) >= longest)


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
