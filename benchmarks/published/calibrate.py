"""Calibrates the constants of each hardware.

In: predictors of cases. Out: for each hardware the constants that make its cases' logarithmic errors small, near what
holds for hardware in general: each keeps the pull of its prior, so that what the rows cannot show stays where it was.
Gauss-Newton on Huber's loss, from the same start in the same order: the same rows give the same constants.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np

from benchmarks.published.constants import KIN, Constants, prior, with_sources
from benchmarks.published.predicting import Predictor
from moai.plan.cluster import Constant
from moai.plan.timings import GENERIC

# How far a constant may be expected from its prior, as a standard deviation of its logarithm. Others are not fitted.
SPREADS = {
    "matmul": 0.10,
    "matmul_fp8": 0.15,
    "matmul_fp4": 0.25,
    "attention": 0.25,
    "wave": 0.7,
    "stream": 0.15,
    "kernel_s": 0.5,
    "inside": 0.25,
    "between": 0.25,
    "message_s": 0.4,
    "launch_s": 0.4,
    "overlap_slowdown": 0.4,
}
# Of a case: what models of this kind leave unexplained, and where an error begins to count less than quadratically.
_NOISE, _HUBER = 0.06, 1.5
_ROUNDS, _STEP, _ENOUGH = 8, 0.05, 3e-3
# Rows of one source and hardware count as this many at the most, for rows of one table are no independent proofs; and
# no more of them than the second number are looked at.
_COUNTED, _LOOKED_AT = 15.0, 90
# A constant that moved less from its prior than this is not said to be fitted.
_MOVED = 0.03


class Calibration:
    """Constants by hardware from some rows, and from these without one source."""

    def __init__(self, predictors: Iterable[Predictor]) -> None:
        self._rows: dict[str, list[Predictor]] = defaultdict(list)
        for predictor in predictors:
            if predictor.case.typical:
                self._rows[predictor.case.hardware].append(predictor)
        self._known: dict[tuple[str, str, bool], Constants] = {}

    def constants(self, hardware: str, without: str = "") -> Constants:
        """Those that differ from the generic ones, each with where it is from."""
        return self._constants(hardware, without, True)

    def every(self) -> dict[str, Constants]:
        return {hardware: self.constants(hardware) for hardware in sorted(self._rows)}

    def _constants(self, hardware: str, without: str, with_kin: bool) -> Constants:
        key = hardware, without, with_kin
        if key not in self._known:
            kin = KIN.get(hardware) if with_kin else None
            near = {} if kin is None else self._constants(kin, without, False)
            start = prior(hardware, {name: replace(c, source=f"as of {kin}") for name, c in near.items()})
            self._known[key] = self._calibrated(hardware, without, start)
        return self._known[key]

    def _calibrated(self, hardware: str, without: str, start: Constants) -> Constants:
        groups: dict[str, list[Predictor]] = defaultdict(list)
        for predictor in self._rows.get(hardware, []):
            if predictor.case.source != without:
                groups[predictor.case.source].append(predictor)
        seen = [p for group in groups.values() for p in group[:: math.ceil(len(group) / _LOOKED_AT)]]
        found = _fit(seen, start) if seen else start
        moved = {n: c if _apart(c, start[n]) else start[n] for n, c in with_sources(found, set(groups)).items()}
        return {name: c for name, c in moved.items() if _apart(c, GENERIC[name])}


def _apart(one: Constant, other: Constant) -> bool:
    return abs(math.log(one.value / other.value)) > _MOVED


def _fit(predictors: Sequence[Predictor], start: Constants) -> dict[str, Constant]:
    names = list(SPREADS)
    priors = np.log([start[name].value for name in names])
    lows = np.log([max(GENERIC[name].low, 1e-9) for name in names])
    highs = np.log([GENERIC[name].high for name in names])
    spreads = np.array([SPREADS[name] for name in names])
    weights = _weights(predictors)
    at = priors.copy()
    errors = _errors(predictors, names, at)
    for _ in range(_ROUNDS):
        slopes = np.empty((len(predictors), len(names)))
        for j in range(len(names)):
            moved = at.copy()
            moved[j] += _STEP
            slopes[:, j] = (_errors(predictors, names, moved) - errors) / _STEP
        robust = weights * np.minimum(1.0, _HUBER * _NOISE / np.maximum(np.abs(errors), 1e-9)) / _NOISE**2
        left = slopes.T @ (slopes * robust[:, None]) + np.diag(1 / spreads**2)
        right = -slopes.T @ (robust * errors) - (at - priors) / spreads**2
        step = np.clip(np.linalg.solve(left, right), -0.5, 0.5)
        at = np.clip(at + step, lows, highs)
        errors = _errors(predictors, names, at)
        if np.abs(step).max() < _ENOUGH:
            break
    return {name: _constant(name, value) for name, value in zip(names, at, strict=True)}


def _weights(predictors: Sequence[Predictor]) -> np.ndarray:
    counts: dict[str, int] = defaultdict(int)
    for predictor in predictors:
        counts[predictor.case.source] += 1
    return np.array([min(1.0, _COUNTED / counts[p.case.source]) for p in predictors])


def _errors(predictors: Sequence[Predictor], names: Sequence[str], at: np.ndarray) -> np.ndarray:
    constants = {name: _constant(name, value) for name, value in zip(names, at, strict=True)}
    return np.array([math.log(p.outcome(constants).step_s / p.case.step_s) for p in predictors])


def _constant(name: str, log: float) -> Constant:
    usual = GENERIC[name]
    value = min(max(float(f"{math.exp(log):.3g}"), usual.low), usual.high)
    return replace(usual, value=value, provenance="fitted")


def at_bounds(constants: Mapping[str, Constants]) -> list[str]:
    """The constants that lie at a physical bound, as "hardware: name"."""
    return [f"{hw}: {name}" for hw, known in constants.items() for name, c in known.items() if c.at_bound]
