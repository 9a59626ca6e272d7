"""Where the forward is cut if its states live on devices already.

In: the forward's steps in the script's order, each with what it reads; how much would be sent if it was cut before each
of them. Out: the first step of every stage but the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

Cost = tuple[int, int]  # bytes of states that lie elsewhere, bytes that cross


def following(
    homes: Sequence[Sequence[tuple[int, int]]], crossing: Sequence[int], stages: int, devices: int
) -> list[int]:
    """`homes[k]`: (device, bytes) of each state that step k reads; stage s is on device s % devices. Cuts are where
    fewest bytes of states lie on another device than that of the step that reads them, and of such places where least
    crosses."""
    away = [_away(homes, stage % devices) for stage in range(min(stages, devices))]
    ends = range(len(homes) + 1)
    best: list[Cost] = [(away[0][end], 0) for end in ends]
    chosen: list[list[int]] = []
    for stage in range(1, stages):
        own = away[stage % devices]
        begins = []
        least, begin = (best[0][0] - own[0], best[0][1] + _at(crossing, 0)), 0
        found: list[Cost] = []
        for end in ends:
            before = (best[end][0] - own[end], best[end][1] + _at(crossing, end))
            if before < least:
                least, begin = before, end
            begins.append(begin)
            found.append((least[0] + own[end], least[1]))
        best = found
        chosen.append(begins)
    end, cuts = len(homes), []
    for begins in reversed(chosen):
        end = begins[end]
        cuts.append(end)
    return cuts[::-1]


def _away(homes: Sequence[Sequence[tuple[int, int]]], device: int) -> list[int]:
    """For each k, the bytes that the steps before it read of other devices' states."""
    return [0, *accumulate(sum(n for home, n in read if home != device) for read in homes)]


def _at(crossing: Sequence[int], place: int) -> int:
    return crossing[place] if place < len(crossing) else 0
