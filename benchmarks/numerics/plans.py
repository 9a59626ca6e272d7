"""Which plans are compared: all combinations of the axes' values, or few of them in which all pairs of values occur.

In: the most devices there may be. Out: `Point`s, each a plan's text with the precision of its cases.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from itertools import combinations, product

DP = TP = (1, 2, 4)
MICRO = (1, 4)
RECOMPUTE = ("none", "default", "full")
STATES = ("whole", "distribute_param", "distribute_low_prec_param")
PRECISION = ("fp64", "fp32", "bf16")


@dataclass(frozen=True, slots=True)
class Point:
    """One value of each axis."""

    dp: int
    tp: int
    micro: int
    recompute: str
    states: str
    precision: str
    pp: int = 1
    schedule: str = "1f1b"

    def __str__(self) -> str:
        """The plan, as MOAI_PLAN takes it: dp, precision, and what is not as usual."""
        parts = [f"dp={self.dp}"]
        parts += [f"tp={self.tp}"] * (self.tp > 1)
        parts += [f"pp={self.pp}"] * (self.pp > 1)
        parts += [f"micro={self.micro}"] * (self.micro > 1)
        parts += [f"recompute={self.recompute}"] * (self.recompute != "none")
        parts += ["distribute_param=true"] * (self.states != "whole")
        parts += ["distribute_low_prec_param=true"] * (self.states == "distribute_low_prec_param")
        parts += [f"schedule={self.schedule}"] * (self.schedule != "1f1b")
        return ",".join([*parts, f"precision={self.precision}"])

    @staticmethod
    def parse(text: str) -> Point:
        """The other way round. ValueError for what no axis has."""
        given = dict(item.split("=", 1) for item in text.replace(" ", "").split(","))
        states = [name for name in STATES if given.pop(name, "false") == "true"]
        point = Point(
            int(given.pop("dp", 1)),
            int(given.pop("tp", 1)),
            int(given.pop("micro", 1)),
            given.pop("recompute", "none"),
            states[-1] if states else "whole",
            given.pop("precision", "fp32"),
            int(given.pop("pp", 1)),
            given.pop("schedule", "1f1b"),
        )
        if given or point.precision not in PRECISION:
            raise ValueError(f'"{text}" is no plan of this report: it has {", ".join(given) or point.precision}.')
        return point

    @property
    def n_devices(self) -> int:
        """How many devices the plan is for."""
        return self.dp * self.tp * self.pp

    @property
    def layers(self) -> int:
        """Of the models: one for each stage at least."""
        return max(2, self.pp * (2 if self.schedule == "interleaved" else 1))

    @property
    def batch(self) -> int:
        """Samples of a step: a number that the parts of the batch do not divide, with one at least for each."""
        return 7 if self.dp * self.micro < 7 else 17


def every(devices: int) -> list[Point]:
    """All combinations for at most `devices` devices."""
    points = (Point(*values) for values in product(DP, TP, MICRO, RECOMPUTE, STATES, PRECISION))
    return [p for p in points if p.n_devices <= devices]


def pairs(devices: int, seed: int = 0) -> list[Point]:
    """Few points in which every pair of values of two axes occurs that occurs at all; the same ones for a seed.

    Greedy: the next is one that adds most new pairs.
    """
    points = every(devices)
    random.Random(seed).shuffle(points)
    missing = set().union(*map(_pairs, points))
    chosen = []
    while missing:
        best = max(points, key=lambda p: len(missing & _pairs(p)))
        chosen.append(best)
        missing -= _pairs(best)
    return sorted(chosen, key=_order)


def _pairs(point: Point) -> set[tuple[int, object, int, object]]:
    return {(i, a, j, b) for (i, a), (j, b) in combinations(enumerate(astuple(point)), 2)}


def _order(point: Point) -> tuple[int, int, int, str]:
    return PRECISION.index(point.precision), point.n_devices, point.tp, str(point)


# Each kind of plan alone, then all of them together: where a point of `pairs` is wrong, these say what is.
KINDS = tuple(
    Point.parse(text)
    for text in (
        "dp=1,precision=fp64",
        "dp=2,precision=fp64",
        "tp=2,precision=fp64",
        "tp=4,precision=fp64",
        "micro=4,precision=fp64",
        "recompute=default,precision=fp64",
        "recompute=full,precision=fp64",
        "dp=2,distribute_param=true,precision=fp64",
        "dp=2,distribute_param=true,distribute_low_prec_param=true,precision=fp64",
        "dp=2,tp=2,micro=4,recompute=full,distribute_param=true,precision=fp64",
        "pp=2,micro=4,precision=fp64",
        "pp=2,micro=4,schedule=gpipe,precision=fp64",
        "tp=2,pp=2,micro=4,recompute=default,precision=fp64",
        "dp=2,pp=2,micro=4,distribute_param=true,precision=fp64",
        "pp=4,micro=4,precision=fp64",
        "pp=2,micro=4,schedule=zero_bubble,precision=fp64",
        "pp=2,micro=4,schedule=interleaved,precision=fp64",
        "tp=2,pp=2,micro=4,recompute=full,schedule=interleaved,precision=fp64",
        "dp=2,pp=2,micro=3,recompute=full,distribute_param=true,schedule=zero_bubble,precision=fp64",
        "dp=2,pp=2,micro=4,distribute_param=true,distribute_low_prec_param=true,precision=bf16",
        "dp=2,pp=2,micro=4,distribute_param=true,distribute_low_prec_param=true,schedule=zero_bubble,precision=bf16",
        "dp=2,precision=fp32",
        "dp=2,precision=bf16",
        "dp=2,tp=2,distribute_param=true,distribute_low_prec_param=true,precision=bf16",
    )
)


def parse_all(texts: Iterable[str], devices: int) -> list[Point]:
    """What --plans says: "pairs", "stages", "kinds", "full", or plans."""
    kinds = [p for p in KINDS if p.n_devices <= devices]
    stages = [p for p in kinds if p.pp > 1]
    named: dict[str, Sequence[Point]] = {
        "pairs": pairs(devices),
        "stages": stages,
        "kinds": kinds,
        "full": every(devices),
    }
    found = [p for text in texts for p in (named[text] if text in named else [Point.parse(text)])]
    return sorted(set(found), key=_order)
