"""What is to be said about a choice of a plan, as numbers and short texts, for screens and pages alike.

In: candidates with their predictions. Out: why one is behind another, what was dropped and why.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields
from typing import Any

from moai.plan.plan import Plan
from moai.plan.prediction import Parts, Prediction
from moai.plan.search import Candidate
from moai.plan.work import Memory

PARTS = {
    "forward": "forward",
    "backward": "backward",
    "recompute": "computing again",
    "optimizer": "optimizer",
    "host": "waiting for the host",
    "tp_exposed": "waiting for messages within layers",
    "dp_exposed": "waiting for gradients and states",
    "pp_exposed": "waiting for messages between stages",
    "slowdown": "slowed down by messages",
    "bubble": "waiting for other stages",
}
MEMORY = {
    "parameters": "parameters",
    "gradients": "gradients",
    "states": "optimizer states",
    "activations": "activations",
    "buffers": "buffers",
}
assert tuple(PARTS) == tuple(f.name for f in fields(Parts))
assert tuple(MEMORY) == tuple(f.name for f in fields(Memory))
# Of differences between plans, those that make out less than this share of the whole one are not named.
_WORTH_NAMING = 0.15
_MOST_NAMED = 2


def parts(prediction: Prediction) -> dict[str, float]:
    """Seconds by part."""
    return asdict(prediction.parts)


def memory(prediction: Prediction) -> dict[str, float]:
    """Bytes on the fullest device by part."""
    return asdict(prediction.memory)


def behind(other: Prediction, best: Prediction) -> str:
    """Which parts make `other` slower than `best`."""
    ours, theirs = parts(best), parts(other)
    more = {name: theirs[name] - ours[name] for name in PARTS}
    total = sum(d for d in more.values() if d > 0)
    named = [n for n in sorted(more, key=more.__getitem__, reverse=True) if more[n] > _WORTH_NAMING * total > 0]
    return ", ".join(f"{PARTS[n]} +{seconds(more[n])}" for n in named[:_MOST_NAMED]) or "as fast"


def dropped(candidates: Sequence[Candidate]) -> list[tuple[str, int, Candidate]]:
    """Reasons with how many candidates they hold for and the first of these, the most frequent reason first. Reasons
    that differ in numbers and plans alone are one."""
    found: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.dropped is not None:
            key = re.sub(r'"[^"]*"|\d[\d.,e+-]*', "#", candidate.dropped)
            found.setdefault(key, []).append(candidate)
    groups = sorted(found.values(), key=len, reverse=True)
    return [(group[0].dropped or "", len(group), group[0]) for group in groups]


def matches(plan: Plan, wanted: Mapping[str, Any]) -> bool:
    """Whether the plan has these values of these keys."""
    return all(getattr(plan, key) == value for key, value in wanted.items())


def seconds(value: float) -> str:
    """A time, as people say it."""
    if value >= 99.995:
        return f"{value:,.0f} s"
    rounded = float(f"{value:.3g}")
    if rounded >= 1:
        return f"{value:.2f} s"
    return f"{rounded * 1e3:.3g} ms" if rounded >= 1e-3 else f"{rounded * 1e6:.3g} us"


def size(nbytes: float) -> str:
    """An amount of memory, as people say it."""
    return f"{nbytes / 2**30:,.2f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:,.1f} MiB"
