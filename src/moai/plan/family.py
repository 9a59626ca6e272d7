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
from moai.plan.work import Held, Observation, Sample, Work

Observe = Callable[[Plan], Observation]

# What may differ between the plans of a family, in numbers; everything else of a Work has to be the same.
_MEASURES = ("flops", "bytes", "m", "n", "k", "message")
_TAGS = ("kind", "phase", "precision", "axis", "until", "looped", "recomputed", "first", "op")


class Family:
    """Plans of one structure, for a global batch of `batch` samples."""

    def __init__(self, observe: Observe, batch: int) -> None:
        self._observe = observe
        self._batch = batch
        self._observed: dict[tuple[float, float], Observation] = {}

    @property
    def begun(self) -> bool:
        """Whether anything was observed."""
        return bool(self._observed)

    def sample(self, plan: Plan) -> Sample:
        """The sample of one of the plans: observed, if it does not follow from what was observed before. Raises what
        observing it does."""
        known = self.known(plan)
        if known is not None:
            return known
        self._observed[self._point(plan)] = found = self._observe(plan)
        return found.sample()

    def known(self, plan: Plan) -> Sample | None:
        """The sample of a plan, if it follows from what was observed."""
        point = self._point(plan)
        found = self._observed.get(point) or self._follows(point)
        return None if found is None else found.sample()

    def _point(self, plan: Plan) -> tuple[float, float]:
        """Samples in a micro-batch on a device, and a device's part of the states that are spread."""
        spread = plan.shard or plan.dp if plan.distribute_param else 1
        return self._batch / (plan.dp * plan.micro), 1.0 / spread

    def _follows(self, point: tuple[float, float]) -> Observation | None:
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
        found = _rebuilt(first, np.maximum(vector, 0.0))
        return replace(found, less=_of(found.less, point), more=_of(found.more, point))


def _alike(a: Observation, b: Observation) -> bool:
    """Whether two observations are of one structure."""
    works = ((a.less, b.less), (a.more, b.more))
    same = all(np.array_equal(getattr(x, tag), getattr(y, tag)) for x, y in works for tag in _TAGS)
    helds = ((a.held, b.held), (a.held_more, b.held_more))
    return same and a.deeper == b.deeper and all(x.total.shape == y.total.shape for x, y in helds)


def _parts(observation: Observation) -> list[tuple[Any, str]]:
    """The fields with numbers, and whose they are."""
    works = [(work, name) for work in (observation.less, observation.more) for name in _MEASURES]
    helds = [(held, f.name) for held in (observation.held, observation.held_more) for f in fields(held)]
    return [*works, *helds, (observation, "handed")]


def _vector(observation: Observation) -> np.ndarray:
    return np.concatenate([np.atleast_1d(getattr(whose, name)) for whose, name in _parts(observation)])


def _rebuilt(template: Observation, vector: np.ndarray) -> Observation:
    """An observation of the same structure with the numbers of `vector`."""
    at = 0
    values: list[Any] = []
    for whose, name in _parts(template):
        old = getattr(whose, name)
        length = np.size(old)
        values.append(vector[at : at + length] if isinstance(old, np.ndarray) else float(vector[at]))
        at += length
    n, h = len(_MEASURES), len(fields(Held))
    less, more, held, held_more = values[:n], values[n : 2 * n], values[2 * n : 2 * n + h], values[2 * n + h : -1]
    return replace(
        template,
        less=replace(template.less, **dict(zip(_MEASURES, less, strict=True))),
        more=replace(template.more, **dict(zip(_MEASURES, more, strict=True))),
        held=Held(*held),
        held_more=Held(*held_more),
        handed=values[-1],
    )


def _of(work: Work, point: tuple[float, float]) -> Work:
    return replace(work, samples=point[0])
