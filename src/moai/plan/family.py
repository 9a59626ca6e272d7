"""Samples of many plans from few observations.

In: a function that observes what a step costs under a plan, which takes a second, and plans that differ in nothing but
in how many devices share the batch and into how many micro-batches it is cut. Out: a Sample of each of these, in a
millisecond. On a device, every length is affine in its samples and in its part of the states; so are operations, bytes
and messages, and what is held at any place of the step. Three observations tell about all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import fields, replace
from typing import Any

import numpy as np

from moai.plan.plan import Plan
from moai.plan.work import Held, Observation, Sample, Work

Observe = Callable[[Plan], Observation]

# What may differ between the plans of a family, in numbers; everything else of a Work has to be the same.
_MEASURES = ("flops", "bytes", "m", "n", "k", "message")
_TAGS = ("kind", "phase", "precision", "axis", "until", "looped", "recomputed", "first")
_ENOUGH = 3


class Family:
    """`plans` of one structure, and a global batch of `batch` samples."""

    def __init__(self, observe: Observe, plans: Iterable[Plan], batch: int) -> None:
        self._observe = observe
        self._batch = batch
        self._points: dict[tuple[float, float], Plan] = {}
        for plan in sorted(plans, key=lambda plan: plan.dp * plan.micro):
            self._points.setdefault(self._point(plan), plan)
        self._observed: dict[tuple[float, float], Observation] = {}
        self._coefficients: np.ndarray | None = None
        self._template: Observation | None = None

    def sample(self, plan: Plan) -> Sample:
        """The sample of one of the plans. Raises what observing it does."""
        point = self._point(plan)
        if point not in self._observed and self._coefficients is None and len(self._points) > _ENOUGH:
            self._fit()
        if self._coefficients is None or point in self._observed:
            return self._seen(point, plan).sample()
        assert self._template is not None
        vector = np.array([1.0, *point]) @ self._coefficients
        found = _rebuilt(self._template, np.maximum(vector, 0.0))
        return replace(found, less=_of(found.less, point), more=_of(found.more, point)).sample()

    def _anchors(self) -> list[tuple[float, float]]:
        """Three points that span a triangle, or two where all lie on a line: those with the fewest parts, which are
        lowered the fastest."""
        first, second, *others = sorted(
            self._points, key=lambda point: self._points[point].dp * self._points[point].micro
        )
        third = next((point for point in others if _area(first, second, point)), None)
        return [first, second] if third is None else [first, second, third]

    def _point(self, plan: Plan) -> tuple[float, float]:
        """Samples in a micro-batch on a device, and a device's part of the states that are spread."""
        spread = plan.shard or plan.dp if plan.distribute_param else 1
        return self._batch / (plan.dp * plan.micro), 1.0 / spread

    def _seen(self, point: tuple[float, float], plan: Plan) -> Observation:
        if point not in self._observed:
            self._observed[point] = self._observe(plan)
        return self._observed[point]

    def _fit(self) -> None:
        anchors = self._anchors()
        seen = [self._seen(point, self._points[point]) for point in anchors]
        if any(not _alike(seen[0], other) for other in seen[1:]):
            self._points = {}  # each on its own
            return
        known = np.array([[1.0, *point] for point in anchors])
        self._coefficients = np.linalg.pinv(known) @ np.stack([_vector(each) for each in seen])
        self._template = seen[0]


def _area(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> float:
    """Of a triangle, times two, as a share of the rectangle around it."""
    (ax, ay), (bx, by), (cx, cy) = a, b, c
    doubled = abs((bx - ax) * (cy - ay) - (cx - ax) * (by - ay))
    around = (max(ax, bx, cx) - min(ax, bx, cx)) * (max(ay, by, cy) - min(ay, by, cy))
    return doubled / around if around else 0.0


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
