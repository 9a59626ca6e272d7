"""In which order a stage runs the parts of its passes: forwards (part 0) and backwards (part 1) of micro-batches."""

from __future__ import annotations

from moai.plan.plan import Schedule

Order = tuple[tuple[int, int], ...]  # (part, pass)

FORWARD, BACKWARD = 0, 1


def order(schedule: Schedule, stage: int, stages: int, passes: int) -> Order:
    """Each stage's forwards, and its backwards, are in the order of the passes: so are its messages.

    "1f1b": a stage begins with as many forwards as there are stages from it to the last one, whose micro-batches it
    then holds at most.
    """
    first = passes if schedule == "gpipe" else min(passes, stages - stage)
    found = [(FORWARD, step) for step in range(first)]
    for step in range(passes):
        found.append((BACKWARD, step))
        if first + step < passes:
            found.append((FORWARD, first + step))
    return tuple(found)
