"""The best plan for a step on a cluster, and why it is.

In: a function that observes what a step costs under a plan, the cluster, and what is allowed. Out: a Choice, with every
plan that was considered: what it would take, or why it need not be asked.

Plans go by layout, the one with the least bound first. A bound is what a layout takes where nothing is computed again
and no gradient is sent, and the optimizer is shared by all: no variant of it is faster. Where matrices are split over
many devices, it is taken from a split over few, whose messages are as long, with the rest of the work shared evenly.
Once the bound is above what the best plan takes, so are all that follow. Of a layout's variants, one that computes more
again, or gathers more often, is only asked where the one before it does not fit: it does all of that and more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from moai.plan.cluster import Cluster
from moai.plan.cost import Prediction, predict
from moai.plan.errors import PlanError
from moai.plan.family import Family, Observe
from moai.plan.plan import Plan
from moai.plan.space import Allowed, layouts, variants
from moai.plan.timings import Timings, groups
from moai.plan.work import Sample, Work


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was considered. `dropped`: why it cannot be, or need not be asked; None for one that could be taken.
    `runnable`: whether programs for it can be made today."""

    plan: Plan
    prediction: Prediction | None = None
    dropped: str | None = None
    runnable: bool = True


@dataclass(frozen=True, slots=True)
class Choice:
    """`best` is the one of `candidates` that is taken: runnable, within `budget_bytes` on each device, and the fastest.
    Candidates that could be taken come first, the fastest first. `tokens`: of a step, 0 where it is not known."""

    best: Candidate
    candidates: tuple[Candidate, ...]
    cluster: Cluster
    budget_bytes: int
    batch: int
    tokens: int
    search_s: float


class NoPlan(PlanError):
    """No plan can be: `candidates` say why."""

    def __init__(self, reason: str, candidates: Sequence[Candidate]) -> None:
        super().__init__(reason)
        self.candidates = tuple(candidates)


@dataclass(frozen=True, slots=True)
class Step:
    """The step to plan for. `observe`: see `lower.sampling`; raises PlanError or RuntimeError for a plan that the step
    cannot be run with. `batch`: its samples. `tokens`: positions in it. `layers`: how many times its layers repeat."""

    observe: Observe
    batch: int
    tokens: int = 0


def search(
    step: Step,
    cluster: Cluster,
    timings: Timings,
    budget_bytes: int,
    allowed: Allowed,
    base: Plan,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Choice:
    """The best plan on all devices of `cluster`. `base` has what is not searched: the precision. `progress` is told how
    many layouts are done, of how many.

    Raises NoPlan where there is none, with the reason and the plan that needs the least.
    """
    begin = time.monotonic()
    asked = _Search(step, cluster, timings, budget_bytes, allowed, base)
    candidates = asked.run(progress)
    taken = [c for c in candidates if c.dropped is None and c.runnable]
    if not taken:
        raise NoPlan(_reason(candidates, allowed, budget_bytes), candidates)
    seconds = time.monotonic() - begin
    return Choice(taken[0], tuple(candidates), cluster, budget_bytes, step.batch, step.tokens, seconds)


class _Search:
    def __init__(
        self, step: Step, cluster: Cluster, timings: Timings, budget_bytes: int, allowed: Allowed, base: Plan
    ) -> None:
        self._step, self._cluster, self._timings = step, cluster, timings
        self._budget, self._allowed = budget_bytes, allowed
        self._layouts = [each for each in layouts(cluster.n_devices, step.batch, base.precision) if _any(each, allowed)]
        self._families = _families(self._layouts, step)
        self._best = float("inf")
        self._found: list[Candidate] = []

    def run(self, progress: Callable[[int, int], None]) -> list[Candidate]:
        """All candidates, those that can be taken first, the fastest first."""
        bounds = sorted(self._bounds(), key=lambda found: found[0].least_s)
        for done, (bound, layout) in enumerate(bounds):
            progress(done, len(bounds))
            for plan in self._variants(layout):
                self._consider(plan, bound)
        return sorted(self._found, key=_order)

    def _variants(self, layout: Plan) -> Iterator[Plan]:
        return (plan for plan in variants(layout) if self._allowed.allows(plan))

    def _bounds(self) -> Iterator[tuple[_Bound, Plan]]:
        for layout in self._layouts:
            try:
                yield self._bound(layout), layout
            except (PlanError, RuntimeError, ValueError) as error:
                reason = error.reason if isinstance(error, PlanError) else str(error)
                self._found += [Candidate(plan, None, reason, plan.pp == 1) for plan in self._variants(layout)]

    def _bound(self, layout: Plan) -> _Bound:
        found = self._timed(self._least_work(layout), layout)
        parts, memory = found.parts, found.memory
        free = parts.dp_exposed + parts.slowdown + parts.optimizer * (1 - 1 / layout.dp)
        return _Bound(found.step_s - free, (memory.parameters + memory.states) / layout.dp)

    def _least_work(self, layout: Plan) -> Sample:
        """No device does less than this."""
        few = replace(
            layout, tp=min((each.tp for each in self._layouts if each.tp > 1), default=1) if layout.tp > 1 else 1
        )
        for plan in (replace(few, dp=2), few):  # sums over one device take no time
            family = self._families.get(_structure(plan))
            if family is not None:
                with suppress(PlanError, RuntimeError):
                    return _shared(family.sample(few), layout.tp // few.tp)
        return self._families[_structure(layout)].sample(layout)

    def _predicted(self, plan: Plan) -> Prediction:
        return self._timed(self._families[_structure(plan)].sample(plan), plan)

    def _timed(self, sample: Sample, plan: Plan) -> Prediction:
        return predict(sample, plan, self._timings, groups(plan, self._cluster))

    def _consider(self, plan: Plan, bound: _Bound) -> None:
        self._found.append(self._judged(plan, bound))

    def _judged(self, plan: Plan, bound: _Bound) -> Candidate:
        runnable = plan.pp == 1
        if bound.least_s >= self._best:
            return Candidate(plan, None, f"slower: {bound.least_s:.3g} s or more", runnable)
        if bound.least_bytes > self._budget:
            return Candidate(plan, None, f"memory: {_size(bound.least_bytes)} or more", runnable)
        lighter = self._without_need(plan)
        if lighter is not None:
            return Candidate(plan, None, f'slower than "{lighter}", which fits', runnable)
        try:
            prediction = self._predicted(plan)
        except (PlanError, RuntimeError, ValueError) as error:
            return Candidate(plan, None, error.reason if isinstance(error, PlanError) else str(error), runnable)
        if prediction.memory.total > self._budget:
            return Candidate(plan, prediction, f"memory: {_size(prediction.memory.total)}", runnable)
        if runnable:
            self._best = min(self._best, prediction.step_s)
        return Candidate(plan, prediction, None, runnable)

    def _without_need(self, plan: Plan) -> Plan | None:
        """A plan that fits, and does all that `plan` does but for computing again and gathering again."""
        for other in reversed(self._found):
            if other.dropped is None and _does_less(other.plan, plan):
                return other.plan
            if (other.plan.dp, other.plan.tp, other.plan.pp) != (plan.dp, plan.tp, plan.pp):
                return None
        return None


@dataclass(frozen=True, slots=True)
class _Bound:
    """No variant of a layout is faster than `least_s`, and none needs less on a device than `least_bytes`."""

    least_s: float
    least_bytes: float


def _shared(sample: Sample, among: int) -> Sample:
    """The sample with all but its messages shared evenly among so many devices."""

    def part(work: Work) -> Work:
        return replace(work, flops=work.flops / among, bytes=work.bytes / among, memory=work.memory * (1 / among))

    return replace(sample, less=part(sample.less), more=part(sample.more))


def _does_less(other: Plan, plan: Plan) -> bool:
    same = replace(other, recompute=plan.recompute, distribute_low_prec_param=plan.distribute_low_prec_param) == plan
    again = other.recompute == plan.recompute or other.recompute == "none"
    gathers = other.distribute_low_prec_param <= plan.distribute_low_prec_param
    return same and again and gathers and other != plan


def _any(layout: Plan, allowed: Allowed) -> bool:
    return any(map(allowed.allows, variants(layout)))


def _structure(plan: Plan) -> Plan:
    """Plans with the same one are lowered to programs that differ in lengths alone."""
    return replace(plan, dp=min(plan.dp, 2), pp=1, micro=2 if plan.micro > 1 else 1)


def _families(all_layouts: Iterable[Plan], step: Step) -> dict[Plan, Family]:
    """By structure. What stages do is read off the program of one that has all layers."""
    members: dict[Plan, list[Plan]] = {}
    for layout in all_layouts:
        for plan in variants(layout):
            members.setdefault(_structure(plan), []).append(replace(plan, pp=1))
    return {structure: Family(step.observe, plans, step.batch) for structure, plans in members.items()}


def _order(candidate: Candidate) -> tuple[object, ...]:
    prediction = candidate.prediction
    seconds = float("inf") if prediction is None else prediction.step_s
    # Of equals, the simplest: the one with the shortest text.
    return candidate.dropped is not None, seconds, len(str(candidate.plan)), str(candidate.plan)


def _reason(candidates: Sequence[Candidate], allowed: Allowed, budget_bytes: int) -> str:
    runnable = [c for c in candidates if c.runnable]
    if not runnable:
        return "Nothing that is allowed can be run on these devices" if candidates else "Nothing is allowed"
    known = [c for c in runnable if c.prediction is not None]
    if not known:
        return runnable[0].dropped or ""
    least = min(known, key=lambda c: c.prediction.memory.total if c.prediction else 0.0)
    assert least.prediction is not None
    return (
        f'No plan fits: "{least.plan}" needs the least memory, {_size(least.prediction.memory.total)} a device; '
        f"{_size(budget_bytes)} of it may be used"
    )


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"
