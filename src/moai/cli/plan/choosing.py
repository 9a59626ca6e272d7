"""From a captured step to its plan.

In: a Captured, and what a person asks. Out: a `Chosen`. Nothing here runs anything on devices.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from moai.cli.plan.figures import matches
from moai.cli.plan.request import Target
from moai.dry.session import Captured
from moai.lower.course import course
from moai.plan.cluster import Cluster
from moai.plan.options import Options
from moai.plan.plan import Plan, Precision
from moai.plan.search import Candidate, Choice, NoPlan, Step, search
from moai.plan.space import Allowed
from moai.plan.timings import Timings, groups
from moai.planning import problem
from moai.platform.errors import AcceleratorError

# How long is looked for the smallest flavor, which is no part of the choice.
_FLAVOR_SECONDS = 20.0


@dataclass(frozen=True, slots=True)
class Chosen:
    """A choice for `target`. `smallest`: the smallest of the flavors that the step fits, None where that is not known;
    `alternative`: the best plan of those that were asked about. `timed_share`: of the step's time, what follows from
    layers of it that were timed on these devices."""

    choice: Choice
    target: Target
    captured: Captured
    smallest: str | None
    alternative: Candidate | None
    timed_share: float = 0.0


class Planner:
    """Plans for one captured step."""

    def __init__(self, step: Step, options: Options | None, restricted: Mapping[str, Any]) -> None:
        self._step = step
        self._options = options
        self.restricted = restricted

    def choose(self, target: Target, more: Mapping[str, Any] | None = None, until: float = float("inf")) -> Choice:
        """The best plan that has the restricted keys, and those of `more`. Raises NoPlan, and TimeoutError when
        time.monotonic() has come to `until`."""

        def progress(*_: int) -> None:
            if time.monotonic() > until:
                raise TimeoutError

        fixed = {**self.restricted, **(more or {})}
        base = Plan(precision=fixed.pop("precision", None) or precision(self._options, target.cluster))
        if level := fixed.pop("recompute", None):
            fixed["recompute"] = (level,)
        allowed = replace(Allowed() if self._options is None else Allowed.by(self._options), **fixed)
        return search(
            self._step,
            target.cluster,
            timings(target),
            target.budget_bytes,
            allowed,
            base,
            progress,
        )

    def timed_share(self, target: Target, plan: Plan) -> float:
        """Of a plan's time, what follows from layers of this step that were timed on the devices of `target`."""
        return problem.timed_share(self._step, plan, timings(target), target.cluster)

    def fits(self, target: Target, until: float) -> bool:
        """Whether the step can be run on `target` at all. Raises TimeoutError as `choose` does."""
        try:
            self.choose(target, {} if "recompute" in self.restricted else {"recompute": "full"}, until)
        except NoPlan:
            return False
        return True


def timings(target: Target) -> Timings:
    """Measured ones where these devices have been profiled."""
    return problem.timings(target.cluster, problem.profile_of(target.devices))


def precision(options: Options | None, cluster: Cluster) -> Precision | None:
    """As the session has it: bf16 where the script allows it and the devices gain by it."""
    peak = cluster.device.peak
    gains = peak.get("bf16", 0.0) > peak["fp32"]
    return "bf16" if options is not None and options.mixed_precision and gains else None


def choose(
    captured: Captured,
    target: Target,
    others: Sequence[Target],
    restricted: Mapping[str, Any],
    why: Mapping[str, Any] | None,
) -> Chosen:
    """The plan for `target`. `others`: the same hardware in other sizes, the smallest first. Raises AcceleratorError
    where there is no plan, which says what would do."""
    with problem.step_for_two(captured.graph) as step:
        return _chosen(Planner(step, captured.options, restricted), captured, target, others, why)


def _chosen(
    planner: Planner, captured: Captured, target: Target, others: Sequence[Target], why: Mapping[str, Any] | None
) -> Chosen:
    try:
        choice = planner.choose(target)
    except NoPlan as error:
        larger = [t for t in others if t.cluster.n_devices > target.cluster.n_devices]
        advice = _advice(planner, larger)
        raise AcceleratorError(f"{target.name}: {error.reason.removesuffix('.')}.{advice}") from None
    smallest = None
    if target.is_flavor:
        smaller = [t for t in others if t.cluster.n_devices < target.cluster.n_devices]
        with suppress(TimeoutError):
            smallest = _smallest(planner, [*smaller, target])
    name = None if smallest is None else smallest.name
    share = planner.timed_share(target, choice.best.plan)
    return Chosen(choice, target, captured, name, _alternative(planner, choice, target, why), share)


def _advice(planner: Planner, larger: Sequence[Target]) -> str:
    """What else could be done where no plan fits."""
    try:
        found = _smallest(planner, larger)
    except TimeoutError:
        return ""
    if found is not None:
        return f" The smallest size that would do: {found.name}."
    return " Without --set there may be one." if planner.restricted else f" Nor would {larger[-1].name} do."


def _smallest(planner: Planner, targets: Sequence[Target]) -> Target | None:
    """The first of `targets` that the step fits, if there is one. Raises TimeoutError if that takes too long."""
    until = time.monotonic() + _FLAVOR_SECONDS
    return next((target for target in targets if planner.fits(target, until)), None)


def _alternative(planner: Planner, choice: Choice, target: Target, why: Mapping[str, Any] | None) -> Candidate | None:
    """The best plan with the keys in `why`, whether it could be taken or not."""
    if why is None:
        return None
    try:
        return planner.choose(target, why).best
    except NoPlan as error:
        candidates = [c for c in error.candidates if matches(c.plan, why)]
        if not candidates:
            keys = ",".join(f"{key}={value}" for key, value in why.items())
            raise AcceleratorError(f'--why "{keys}": there is no such plan for this step on {target.name}.') from None
        return next((c for c in candidates if c.prediction is not None), candidates[0])  # the best come first


def course_of(chosen: Chosen) -> list[tuple[float, float]] | None:
    """(part of the step's time, bytes that a device holds) under the chosen plan; None where that cannot be looked at:
    of stages, and of a step whose optimizer is in another graph."""
    plan, target, graph = chosen.choice.best.plan, chosen.target, chosen.captured.graph
    if plan.pp > 1 or not graph.trains:
        return None
    taken, over = timings(target), groups(plan, target.cluster)
    return course(graph, plan, lambda work: taken.durations(work, over))


def ratio(other: Candidate, best: Candidate) -> float:
    """How many times as long the step takes."""
    assert other.prediction is not None and best.prediction is not None
    return other.prediction.step_s / best.prediction.step_s
