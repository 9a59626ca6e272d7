"""The messages of stages held against each other.

In: what each stage sends and receives, in order. Out: nothing, or why it does not fit.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Event:
    """A message to or from stage `other`. `what`: the shapes and dtypes in it."""

    kind: Literal["send", "receive"]
    other: int
    what: tuple[Any, ...]


def misfit(stages: Sequence[Sequence[Event]]) -> str | None:
    """Why stages that do this would wait forever, or receive something else than they expect. Sending waits for
    nobody."""
    mail: dict[tuple[int, int], deque[tuple[Any, ...]]] = defaultdict(deque)
    at = [0] * len(stages)
    awake = deque(range(len(stages)))
    while awake:
        stage = awake.popleft()
        events = stages[stage]
        while at[stage] < len(events):
            event = events[at[stage]]
            if event.kind == "send":
                mail[stage, event.other].append(event.what)
                awake.append(event.other)
            elif not (box := mail[event.other, stage]):
                break
            elif (sent := box.popleft()) != event.what:
                return f"stage {event.other} sends {sent}, and stage {stage} expects {event.what}"
            at[stage] += 1
    for stage, events in enumerate(stages):
        if at[stage] < len(events):
            return f"stage {stage} waits forever for its message {at[stage]}, from stage {events[at[stage]].other}"
    left = next((pair for pair, box in mail.items() if box), None)
    return None if left is None else f"stage {left[0]} sends a message that stage {left[1]} does not receive"
