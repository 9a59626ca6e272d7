"""The text of a forced plan: "dp=2,tp=2,micro=4,recompute=full,distribute_param=true".

In: the value of MOAI_PLAN or --plan, and how many devices there are. Out: a Plan that is possible on them, or a
PlanError that says what is wrong and what is possible. `str(plan)` is the way back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from moai.plan.errors import PlanError
from moai.plan.nearest import nearest, obstacle
from moai.plan.plan import Plan

VARIABLE = "MOAI_PLAN"

_COUNTS = ("dp", "tp", "pp", "micro", "shard", "chunks")
_WORDS: dict[str, dict[str, Any]] = {
    "recompute": {"none": "none", "default": "default", "full": "full"},
    "distribute_param": {"true": True, "false": False},
    "distribute_low_prec_param": {"true": True, "false": False},
    "precision": {"fp32": "fp32", "bf16": "bf16", "fp64": "fp64"},
    "schedule": {"1f1b": "1f1b", "gpipe": "gpipe", "zero_bubble": "zero_bubble", "interleaved": "interleaved"},
}
_KEYS = (*_COUNTS, *_WORDS, "layers")
_MOST_DIGITS = 9
_ALIKE = 0.8  # "micor" is like "micro", "fp16" is not like "fp64"


def parse(text: str, n_devices: int, source: str = VARIABLE) -> Plan:
    """The plan that `text` describes on an accelerator of `n_devices` devices; `source` is where it was written.

    Upper and lower case are the same, and spaces do not count. Without dp, it is what tp and pp leave of the devices;
    the other keys have Plan's defaults. Raises PlanError.
    """
    reader = _Reader()
    for item in text.split(","):
        reader.read(item.strip().lower())
    plan = _completed(reader.values, n_devices)
    reason = "; ".join(reader.mistakes) or _obstacle(plan, reader.values, n_devices)
    if reason:
        raise PlanError(f'{source}="{text}": {reason}.', nearest(plan, n_devices))
    return plan


def restrictions(text: str, n_devices: int, source: str) -> dict[str, Any]:
    """The keys that `text` fixes for plans of `n_devices` devices, with their values. Raises PlanError."""
    reader = _Reader()
    for item in text.split(","):
        reader.read(item.strip().lower())
    sizes = {key: reader.values[key] for key in ("dp", "tp", "pp") if key in reader.values}
    if not reader.mistakes and n_devices % math.prod(sizes.values()):
        product = " times ".join(f"{key}={size}" for key, size in sizes.items())
        reader.mistakes.append(f"{product} does not divide the {n_devices} devices")
    if reader.mistakes:
        raise PlanError(f'{source} "{text}": {"; ".join(reader.mistakes)}.')
    return reader.values


class _Reader:
    """Collects the values of the keys, and the mistakes; where it is plain what was meant, the value all the same."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.mistakes: list[str] = []

    def read(self, item: str) -> None:
        key, equals, value = (part.strip() for part in item.partition("="))
        if not equals:
            self.mistakes.append(f'"{item}" is not of the form KEY=VALUE' if item else "a KEY=VALUE is missing")
            return
        known = self._known(key, _KEYS, f'there is no key "{key}"')
        if known is None:
            return
        if known in self.values:
            self.mistakes.append(f"{known} is given twice")
            return
        found = self._layers(value) if known == "layers" else self._of(known, value)
        if found is not None:
            self.values[known] = found

    def _of(self, key: str, value: str) -> Any:
        return self._count(key, value) if key in _COUNTS else self._word(key, value)

    def _layers(self, value: str) -> tuple[int, ...] | None:
        parts = [part.strip() for part in value.split("+")]
        if all(part.isascii() and part.isdigit() and len(part) <= _MOST_DIGITS for part in parts):
            return tuple(map(int, parts))
        self.mistakes.append(f"layers must be a number for each stage, with + between, not {value or 'nothing'}")
        return None

    def _count(self, key: str, value: str) -> int | None:
        if value.isascii() and value.isdigit() and len(value) <= _MOST_DIGITS and int(value) > 0:
            return int(value)
        self.mistakes.append(f"{key} must be a whole number, 1 or more, not {value or 'nothing'}")
        return None

    def _word(self, key: str, value: str) -> Any:
        words = _WORDS[key]
        known = self._known(value, tuple(words), f"{key} cannot be {value or 'nothing'}")
        return None if known is None else words[known]

    def _known(self, word: str, known: Sequence[str], mistake: str) -> str | None:
        """`word`, or else the one of `known` that was meant, if that can be guessed."""
        if word in known:
            return word
        alike = get_close_matches(word, known, cutoff=_ALIKE)
        meant = max(alike, key=lambda other: other[0] == word[0], default=None)  # few people mistype the first letter
        advice = f"did you mean {meant}?" if meant else f"there are {', '.join(known)}"
        self.mistakes.append(f"{mistake} ({advice})")
        return meant


def _completed(values: dict[str, Any], n_devices: int) -> Plan:
    remaining = max(1, n_devices // (values.get("tp", 1) * values.get("pp", 1)))
    return Plan(**{"dp": remaining, **values})


def _obstacle(plan: Plan, values: dict[str, Any], n_devices: int) -> str | None:
    if "dp" not in values and n_devices % (plan.tp * plan.pp):
        sizes = " times ".join(f"{key}={size}" for key, size in (("tp", plan.tp), ("pp", plan.pp)) if size > 1)
        return f"{sizes} does not divide the {n_devices} devices of the accelerator"
    if "chunks" in values and plan.schedule != "interleaved":
        return f"chunks={plan.chunks} needs schedule=interleaved: it is how many stages a device has"
    return obstacle(plan, n_devices)
