"""The messages of stages held against each other.

In: what each stage sends and receives, in order. Out: nothing, or why it does not fit.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Event:
    """A message to stage `other`; or from it: message `nth` of those that it sends to this one. `what`: the shapes and
    dtypes in it."""

    other: int
    what: tuple[Any, ...]
    nth: int | None = None


def misfit(stages: Sequence[Sequence[Event]]) -> str | None:
    """Why stages that do this would wait forever, or receive something else than they expect. Sending waits for
    nobody."""
    sent: dict[tuple[int, int], list[tuple[Any, ...]]] = defaultdict(list)
    taken: dict[tuple[int, int], set[int]] = defaultdict(set)
    at = [0] * len(stages)
    awake = deque(range(len(stages)))
    while awake:
        stage = awake.popleft()
        events = stages[stage]
        while at[stage] < len(events):
            event = events[at[stage]]
            if event.nth is None:
                sent[stage, event.other].append(event.what)
                awake.append(event.other)
                at[stage] += 1
                continue
            way = event.other, stage
            if event.nth >= len(sent[way]):
                break
            if sent[way][event.nth] != event.what:
                return f"stage {event.other} sends {sent[way][event.nth]}, and stage {stage} expects {event.what}"
            if event.nth in taken[way]:
                return f"stage {stage} receives message {event.nth} of stage {event.other} twice"
            taken[way].add(event.nth)
            at[stage] += 1
    for stage, events in enumerate(stages):
        if at[stage] < len(events):
            return f"stage {stage} waits forever for message {events[at[stage]].nth} of stage {events[at[stage]].other}"
    left = next((way for way, messages in sent.items() if len(messages) > len(taken[way])), None)
    return None if left is None else f"stage {left[0]} sends a message that stage {left[1]} does not receive"
