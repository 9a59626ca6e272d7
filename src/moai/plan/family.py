"""Samples of many plans from few observations.

In: a function that observes what a step costs under a plan, which takes a second, and plans that differ in nothing but
in how many devices share the batch and into how many micro-batches it is cut. Out: a Sample of each of these, in a
millisecond. On a device, every length is affine in its samples and in its part of the states; so are operations, bytes
and messages, and what is held at any place of the step. Three observations tell about all,
and two about those on a line.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from moai.plan.plan import Plan
from moai.plan.work import Held, Observation, Sample, Stages, StageWork, Work

Observed = Observation | Stages
Observe = Callable[[Plan], Observed]

# What may differ between the plans of a family, in numbers; everything else of a Work has to be the same.
_MEASURES = ("flops", "bytes", "m", "n", "k", "message")
_TAGS = ("kind", "phase", "precision", "axis", "until", "looped", "recomputed", "first", "late", "op")


class Family:
    """Plans of one structure, for a global batch of `batch` samples."""

    def __init__(self, observe: Observe, batch: int) -> None:
        self._observe = observe
        self._batch = batch
        self._observed: dict[tuple[float, float], Observed] = {}

    @property
    def begun(self) -> bool:
        """Whether anything was observed."""
        return bool(self._observed)

    def sample(self, plan: Plan) -> Sample | Stages:
        """The sample of one of the plans: observed, if it does not follow from what was observed before. Raises what
        observing it does."""
        known = self.known(plan)
        if known is not None:
            return known
        self._observed[self._point(plan)] = found = self._observe(plan)
        return found.sample()

    def known(self, plan: Plan) -> Sample | Stages | None:
        """The sample of a plan, if it follows from what was observed."""
        point = self._point(plan)
        found = self._observed.get(point) or self._follows(point)
        return None if found is None else found.sample()

    def _point(self, plan: Plan) -> tuple[float, float]:
        """Samples in a micro-batch on a device, and a device's part of the states that are spread."""
        spread = plan.shard or plan.dp if plan.distribute_param else 1
        return self._batch / (plan.dp * plan.micro), 1.0 / spread

    def _follows(self, point: tuple[float, float]) -> Observed | None:
        """What observing `point` would give, where it lies in the plane, or on the line, of points that are known."""
        known = list(self._observed)
        if len(known) < 2:
            return None
        corners = np.array([[1.0, *each] for each in known]).T
        weights, *_ = np.linalg.lstsq(corners, np.array([1.0, *point]))
        if not np.allclose(corners @ weights, [1.0, *point], rtol=1e-9, atol=1e-12):
            return None
        first, *others = self._observed.values()
        if not all(_alike(first, other) for other in others):
            return None
        vector = weights @ np.stack([_vector(each) for each in self._observed.values()])
        return _rebuilt(first, _Numbers(np.maximum(vector, 0.0)), point[0])


def _alike(a: Observed, b: Observed) -> bool:
    """Whether two observations are of one structure."""
    return type(a) is type(b) and all(map(_same, _parts(a), _parts(b)))


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Work):
        return all(np.array_equal(getattr(a, tag), getattr(b, tag)) for tag in _TAGS)
    if isinstance(a, Held):
        return bool(a.total.shape == b.total.shape)
    return not isinstance(a, int) or bool(a == b)  # numbers of layers


def _parts(observation: Any) -> list[Any]:
    """What an observation is made of, that of its stages too: Works, Helds and numbers."""
    found: list[Any] = []
    for f in fields(observation):
        value = getattr(observation, f.name)
        found += _parts(value) if isinstance(value, StageWork) else [value]
    return found


def _vector(observation: Observed) -> np.ndarray:
    return np.concatenate([np.atleast_1d(x) for part in _parts(observation) for x in _numbers(part)])


def _numbers(part: Any) -> list[Any]:
    """What may differ between the plans of a family."""
    if isinstance(part, Work):
        return [getattr(part, name) for name in _MEASURES]
    if isinstance(part, Held):
        return [getattr(part, f.name) for f in fields(Held)]
    return [] if isinstance(part, int) else [part]


class _Numbers:
    """A vector that is read from its begin."""

    def __init__(self, vector: np.ndarray) -> None:
        self._vector, self._at = vector, 0

    def take(self, n: int) -> np.ndarray:
        self._at += n
        return self._vector[self._at - n : self._at]


def _rebuilt(template: Any, numbers: _Numbers, samples: float) -> Any:
    """What `template` is, with these numbers in place of its own, and so many samples."""
    if isinstance(template, int):
        return template
    if isinstance(template, float):
        return float(numbers.take(1)[0])
    if isinstance(template, np.ndarray):
        return numbers.take(template.size)
    names = _MEASURES if isinstance(template, Work) else [f.name for f in fields(template)]
    found = {name: _rebuilt(getattr(template, name), numbers, samples) for name in names}
    return replace(template, **found, **({"samples": samples} if isinstance(template, Work) else {}))
