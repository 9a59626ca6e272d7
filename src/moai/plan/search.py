"""The best plan for a step on a cluster, and why it is.

In: a function that observes what a step costs under a plan, the cluster, and what is allowed. Out: a Choice, with every
plan that was considered: what it would take, or why it need not be asked.

Plans go by layout, the one with the least bound first. A bound is what a layout takes where nothing is computed again
and no gradient is sent, and the optimizer is shared by all: no variant of it is faster. Where matrices are split over
many devices, it is taken from a split over few, whose messages are as long, with the rest of the work shared evenly.
Once the bound is above what the best plan takes, so are all that follow. Of a layout's variants, one that computes more
again, or gathers more often, is only asked where the one before it does not fit: it does all of that and more, and is
no faster.

Stages share the layers, and the bound is that of a step which they share evenly, with the least bubble of the orders in
which they can work: gradients of a product's weights take no longer than those of its inputs. A plan with stages is
asked about only where it may be so much faster than the best without that it would be taken; and once it is, so are
the other orders, which do the same and wait otherwise. One thing is not proven: if the model fits without stages, they
are asked about where the plainest order may be faster. It keeps many plans away of which few are, by some percent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from moai.plan.cluster import Cluster
from moai.plan.cost import INDISTINCT, predict
from moai.plan.errors import PlanError
from moai.plan.family import Family, Observe
from moai.plan.plan import Plan, Recompute
from moai.plan.prediction import Prediction
from moai.plan.space import RECOMPUTE, Allowed, layouts, orders, variants
from moai.plan.timings import Group, Timings, groups
from moai.plan.work import AXES, KINDS, MESSAGES, Memory, Sample, Stages, Task, Work

# Of the time that computing again takes, so much is left at least where micro-batches are larger.
_LARGER_MATRICES = 0.9


@dataclass(frozen=True, slots=True)
class Candidate:
    """A plan that was considered. `dropped`: why it cannot be, or need not be asked; None for one that could be taken.
    What was predicted says how many layers each stage has, and so does the plan."""

    plan: Plan
    prediction: Prediction | None = None
    dropped: str | None = None


@dataclass(frozen=True, slots=True)
class Choice:
    """`best` is the one of `candidates` that is taken: within `budget_bytes` on each device, and the fastest.
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
    cannot be run with. `batch`: its samples. `tokens`: positions in it. `layers`: how many of its layers repeat, None
    where that is not known. `expect` is told of a plan that is about to be observed, and of the one that will probably
    be next."""

    observe: Observe
    batch: int
    tokens: int = 0
    layers: int | None = None
    expect: Callable[[Plan, Plan], None] = lambda plan, probable: None


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
    taken = [c for c in candidates if c.dropped is None]
    if not taken:
        raise NoPlan(_reason(candidates, asked.lightest(), budget_bytes), candidates)
    seconds = time.monotonic() - begin
    return Choice(_safest(taken), tuple(candidates), cluster, budget_bytes, step.batch, step.tokens, seconds)


def _safest(fitting: Sequence[Candidate]) -> Candidate:
    """Of the plans that are about as fast as the first, the one with the fewest stages, of these the one in which the
    most devices share the batch, and then the plainest order: the less is sent, the less can be predicted wrongly."""
    seconds = [c.prediction.step_s for c in fitting if c.prediction is not None]
    alike = [c for c, s in zip(fitting, seconds, strict=True) if s <= seconds[0] * (1 + INDISTINCT)]
    return min(alike, key=lambda c: (c.plan.pp, -c.plan.dp, c.plan.schedule != Plan().schedule))


class _Search:
    def __init__(
        self, step: Step, cluster: Cluster, timings: Timings, budget_bytes: int, allowed: Allowed, base: Plan
    ) -> None:
        self._step, self._cluster, self._timings = step, cluster, timings
        self._budget, self._allowed = budget_bytes, allowed
        every = layouts(cluster.n_devices, step.batch, base.precision, step.layers)
        self._layouts = [each for each in every if any(True for _ in self._variants(each))]
        self._families: dict[Plan, Family] = {}
        self._best = float("inf")
        self._best_whole = float("inf")  # without stages
        self._again: dict[Recompute, float] = {}  # device seconds of a step
        self._found: list[Candidate] = []
        self._fitting: dict[tuple[int, ...], list[Plan]] = {}  # by layout
        self._seen: dict[tuple[int, ...], list[tuple[Plan, float]]] = {}  # by layout, with seconds of work
        self._coming: Iterable[Plan] = ()  # what will be asked for next, if it is not known by then

    def run(self, progress: Callable[[int, int], None]) -> list[Candidate]:
        """All candidates, those that can be taken first, the fastest first."""
        found = sorted(self._bounds(), key=lambda found: found[0].least_s + found[0].least_bubble_s)
        whole, staged = ([each for each in found if (each[1].pp > 1) == several] for several in (False, True))
        # What computes nothing again is mostly the fastest, and the sooner the fastest is known the less is asked.
        for bounds, level in product((whole, staged), RECOMPUTE):
            for done, (bound, layout) in enumerate(bounds):
                progress(done, len(bounds))
                for plan in self._of_level(layout, level):
                    self._coming = self._worth_asking(plan, bounds[done:])
                    self._consider(plan, bound)
        return sorted(self._found, key=_order)

    def lightest(self) -> tuple[Plan, float] | None:
        """The plan that needs the least memory of a device, and how many bytes that is: of those with the most
        micro-batches, the one that keeps the least."""
        most: dict[tuple[int, ...], Plan] = {}
        for layout in sorted(self._layouts, key=lambda each: each.micro):
            if allowed := list(self._variants(layout)):
                most[layout.dp, layout.tp, layout.pp] = allowed[-1]
        found = []
        for plan in most.values():
            with suppress(PlanError, RuntimeError, ValueError):
                found.append((plan, self._predicted(plan).memory.total))
        return min(found, key=lambda each: each[1], default=None)

    def _variants(self, layout: Plan) -> Iterator[Plan]:
        """In the plainest order, if any is allowed."""
        return (plan for plan in variants(layout) if any(True for _ in self._orders(plan)))

    def _orders(self, plan: Plan) -> Iterator[Plan]:
        return filter(self._allowed.allows, orders(plan, self._step.layers))

    def _of_level(self, layout: Plan, level: Recompute) -> Iterator[Plan]:
        return (plan for plan in self._variants(layout) if plan.recompute == level)

    def _worth_asking(self, plan: Plan, bounds: Sequence[tuple[_Bound, Plan]]) -> Iterator[Plan]:
        """What will be asked for after `plan`, the first one of `bounds`, as far as can be told before."""
        for bound, layout in bounds:
            for other in self._of_level(layout, plan.recompute):
                spared = _does_less(plan, other) and bound.fits(plan, self._budget)
                if not spared and self._needless(other, bound) is None:
                    yield other

    def _bounds(self) -> Iterator[tuple[_Bound, Plan]]:
        for done, layout in enumerate(self._layouts):
            self._coming = (each for each in map(self._least, self._layouts[done:]) if each.dp > 1)
            try:
                yield self._bound(layout), layout
            except (PlanError, RuntimeError, ValueError) as error:
                reason = error.reason if isinstance(error, PlanError) else str(error)
                every = (ordered for plan in self._variants(layout) for ordered in self._orders(plan))
                self._found += [Candidate(plan, None, reason) for plan in every]

    def _bound(self, layout: Plan) -> _Bound:
        few, sample = self._least_work(layout)
        among = layout.tp // few
        sample = _sharing_memory(sample, among)
        whole = replace(layout, pp=1)
        found = predict(sample, whole, _Shared(self._timings, among), groups(layout, self._cluster))
        parts = found.parts
        free = parts.dp_exposed + parts.slowdown + parts.optimizer * (1 - 1 / layout.dp)
        (stage,) = found.stages
        looped = layout.micro * (stage.forward_s + stage.backward_s)
        looped = max(0.0, looped - parts.dp_exposed - parts.slowdown)
        once = max(0.0, found.step_s - free - looped)
        waits = self._waits(layout, looped / layout.micro, stage.forward_s) or [0.0]
        bubble, least_bubble = ((layout.pp - 1) * wait / layout.pp for wait in (max(waits), min(waits)))
        scattered = self._scattered_s(sample, layout, among)
        return _Bound(
            (looped + once) / layout.pp,
            bubble,
            least_bubble,
            scattered,
            found.memory * (1 / layout.pp),
            _kept(sample, layout),
        )

    def _waits(self, layout: Plan, pass_s: float, forward_s: float) -> list[float]:
        """Seconds that all stages wait together for each one at the least, by order, where a pass through all of them
        takes `pass_s`, and `forward_s` of it is the forward."""
        return [
            forward_s if plan.schedule == "zero_bubble" else pass_s * plan.pp / plan.n_stages
            for plan in orders(layout, self._step.layers)
            if self._allowed.allows_order(plan)
        ]

    def _scattered_s(self, sample: Sample, layout: Plan, among: int) -> float:
        """Seconds to sum a device's gradients and leave each device its part. `among`: devices that share those of the
        sample."""
        nbytes = _gradients(sample.less) + (_gradients(sample.more) - _gradients(sample.less)) * sample.deeper
        if layout.dp == 1 or nbytes <= 0:
            return 0.0
        message = Work.of([Task("reduce_scatter", "backward", message=nbytes / (among * layout.pp))])
        return float(self._timings.durations(message, groups(layout, self._cluster))[0])

    def _least_work(self, layout: Plan) -> tuple[int, Sample]:
        """For the fewest devices that share matrices, how many they are and what they do."""
        few = self._least(layout)
        several = self._families.get(_structure(replace(few, dp=2)))
        known = several.known(few) if several is not None else None
        if isinstance(known, Sample):
            return few.tp, known  # for one device, too: its sums take no time
        try:
            return few.tp, self._sample(few)
        except (PlanError, RuntimeError):
            whole = replace(layout, pp=1)
            if few == whole:
                raise
            return layout.tp, self._sample(whole)

    def _least(self, layout: Plan) -> Plan:
        """The layout with the fewest devices that share matrices."""
        least = min((each.tp for each in self._layouts if each.tp > 1), default=1) if layout.tp > 1 else 1
        return replace(layout, tp=least, pp=1)

    def _sample(self, plan: Plan) -> Sample:
        """Of a plan without stages."""
        found = self._observed(plan)
        assert isinstance(found, Sample)
        return found

    def _observed(self, plan: Plan) -> Sample | Stages:
        family = self._families.setdefault(_structure(plan), Family(self._step.observe, self._step.batch))
        known = family.known(plan)
        if known is not None:
            return known
        self._expect(plan, family)
        return family.sample(plan)

    def _expect(self, plan: Plan, family: Family) -> None:
        """Says that `plan` is asked for, and what probably will be afterwards."""
        for other in self._coming:
            # A second plan of a family mostly tells about all others.
            tells = family.begun and _structure(other) == _structure(plan)
            if other != plan and not tells and self._known(other) is None:
                self._step.expect(plan, other)
                return

    def _predicted(self, plan: Plan) -> Prediction:
        over = groups(plan, self._cluster)
        return predict(self._observed(plan), plan, self._timings, over, budget_bytes=self._budget)

    def _known(self, plan: Plan) -> Sample | Stages | None:
        family = self._families.get(_structure(plan))
        return None if family is None else family.known(plan)

    def _consider(self, plan: Plan, bound: _Bound) -> None:
        """In every order that is allowed."""
        found = self._judged(plan, bound)
        waiting = 0.0
        if found.prediction is not None:
            waiting = found.prediction.parts.bubble + found.prediction.parts.pp_exposed
            self._seen.setdefault(_layout(plan), []).append((plan, found.prediction.step_s - waiting))
        for ordered in self._orders(plan):
            candidate = found if ordered == plan else self._reordered(ordered, found, waiting)
            self._found.append(candidate)
            if candidate.dropped is None:
                self._fitting.setdefault(_layout(plan), []).append(plan)
                assert candidate.prediction is not None
                self._best = min(self._best, candidate.prediction.step_s)
                if plan.pp == 1:
                    self._best_whole = min(self._best_whole, candidate.prediction.step_s)

    def _judged(self, plan: Plan, bound: _Bound) -> Candidate:
        needless = self._needless(plan, bound)
        return self._asked(plan) if needless is None else Candidate(plan, None, needless)

    def _reordered(self, plan: Plan, plain: Candidate, waiting: float) -> Candidate:
        """The same as `plain`, whose stages are `waiting` for each other, in another order."""
        if plain.prediction is None:
            return Candidate(plan, None, f"{plain.dropped} in the plainest order")
        slow = self._slow(plan, plain.prediction.step_s - waiting)
        return self._asked(plan) if slow is None else Candidate(plan, None, slow)

    def _asked(self, plan: Plan) -> Candidate:
        try:
            prediction = self._predicted(plan)
        except (PlanError, RuntimeError, ValueError) as error:
            return Candidate(plan, None, error.reason if isinstance(error, PlanError) else str(error))
        self._note(plan, prediction)
        if plan.pp > 1:
            plan = replace(plan, layers=tuple(stage.layers for stage in prediction.stages))
        fits = prediction.memory.total <= self._budget
        return Candidate(plan, prediction, None if fits else f"memory: {_size(prediction.memory.total)}")

    def _needless(self, plan: Plan, bound: _Bound) -> str | None:
        """Why the plan need not be asked, if that is known."""
        slow, least_bytes = self._slow(plan, self._least_s(plan, bound)), bound.least_bytes(plan)
        if slow is not None:
            return slow
        if least_bytes > self._budget:
            return f"memory: {_size(least_bytes)} or more"
        lighter = self._without_need(plan)
        return None if lighter is None else f'slower than "{lighter}", which fits'

    def _slow(self, plan: Plan, least_s: float) -> str | None:
        """Why a plan that takes so long at least would not be chosen, if that is known."""
        if least_s >= self._best * (1 + INDISTINCT):
            return f"slower: {least_s:.3g} s or more"
        if plan.pp > 1 and least_s * (1 + INDISTINCT) >= self._best_whole:
            return f"not faster than without stages: {least_s:.3g} s or more"
        return None

    def _least_s(self, plan: Plan, bound: _Bound) -> float:
        """What the plan takes at the least: as much as what does less than it."""
        lighter = [seconds for other, seconds in self._seen.get(_layout(plan), []) if _does_less(other, plan)]
        bubble = bound.bubble_s if self._best_whole < float("inf") else bound.least_bubble_s
        return max(bound.least_s + bubble + self._again_s(plan) + self._summing_s(plan, bound), *lighter, 0.0)

    def _summing_s(self, plan: Plan, bound: _Bound) -> float:
        """What summing gradients adds at the least. Behind a loop, nothing hides it, and stages always have one;
        elsewhere, the backward is slowed down by it."""
        if plan.pp > 1 and plan.micro > 1 and not plan.distribute_low_prec_param:
            return bound.scattered_s
        spread = plan.distribute_param or plan.pp > 1
        return bound.scattered_s * min(1.0, self._timings.overlap_slowdown) if spread else 0.0

    def _again_s(self, plan: Plan) -> float:
        """What computing again takes at least: as much as was seen where no matrix was split, shared by all."""
        return self._again.get(plan.recompute, 0.0) / plan.n_devices

    def _note(self, plan: Plan, prediction: Prediction) -> None:
        if plan.tp == plan.pp == 1:
            seen = prediction.parts.recompute * plan.dp * _LARGER_MATRICES
            self._again[plan.recompute] = min(seen, self._again.get(plan.recompute, seen))

    def _without_need(self, plan: Plan) -> Plan | None:
        """A plan that fits, and does all that `plan` does but for computing again and gathering again."""
        fitting = self._fitting.get(_layout(plan), [])
        return next((other for other in fitting if _does_less(other, plan)), None)


@dataclass(frozen=True, slots=True)
class _Bound:
    """No variant of a layout is faster than `least_s`, to which comes what stages wait for each other: `bubble_s` in
    the plainest order, `least_bubble_s` in the best. `scattered_s`: of messages that sum gradients. `memory`: what a
    device holds where nothing is spread or computed again; `kept`: bytes of activations that are held even where all
    is computed again."""

    least_s: float
    bubble_s: float
    least_bubble_s: float
    scattered_s: float
    memory: Memory
    kept: float

    def least_bytes(self, plan: Plan) -> float:
        """What a device holds at least. Spreading leaves activations as they are; and gradients are as large as
        parameters when the last of them is made."""
        spread = plan.dp if plan.distribute_param else 1
        stored = (self.memory.parameters + self.memory.states) / spread
        activations = self.memory.activations if plan.recompute == "none" else self.kept
        return stored + max(activations, self.memory.parameters / spread)

    def fits(self, plan: Plan, budget_bytes: float) -> bool:
        """Whether a plan that computes nothing again will fit, by all appearances."""
        return plan.recompute == "none" and self.least_bytes(plan) <= budget_bytes


@dataclass(frozen=True, slots=True)
class _Shared:
    """Timings of devices that share evenly what takes one so long, but for messages: none is sooner done with its part.
    Smaller products are no more efficient than large ones."""

    timings: Timings
    among: int

    @property
    def host_s_per_launch(self) -> float:
        return self.timings.host_s_per_launch

    @property
    def overlap_slowdown(self) -> float:
        return self.timings.overlap_slowdown

    def durations(self, work: Work, groups: Mapping[str, Group]) -> np.ndarray:
        seconds = self.timings.durations(work, groups)
        return np.where(work.kind < KINDS.index(MESSAGES[0]), seconds / self.among, seconds)


def _sharing_memory(sample: Sample, among: int) -> Sample:
    """The sample with its memory shared evenly among so many devices."""
    less, more = (replace(work, memory=work.memory * (1 / among)) for work in (sample.less, sample.more))
    return replace(sample, less=less, more=more)


def _kept(sample: Sample, layout: Plan) -> float:
    """Bytes of a layout's activations that are held whatever is computed again: what goes into layers, and what lies
    beside them where the backward begins."""
    inside = sample.more.memory.activations - sample.less.memory.activations
    beside = max(0.0, sample.less.memory.activations - sample.layers * inside) if layout.pp == 1 else 0.0
    return beside + sample.handed / layout.tp * (sample.layers + sample.deeper) / layout.pp


def _gradients(work: Work) -> float:
    """Bytes that devices of the batch sum, once a step."""
    summed = (work.kind == KINDS.index("all_reduce")) & (work.axis == AXES.index("dp")) & ~work.looped
    return float(work.message[summed].sum())


def _layout(plan: Plan) -> tuple[int, ...]:
    return plan.dp, plan.tp, plan.pp, plan.micro


def _does_less(other: Plan, plan: Plan) -> bool:
    same = replace(other, recompute=plan.recompute, distribute_low_prec_param=plan.distribute_low_prec_param) == plan
    again = other.recompute == plan.recompute or other.recompute == "none"
    gathers = other.distribute_low_prec_param <= plan.distribute_low_prec_param
    return same and again and gathers and other != plan


def _structure(plan: Plan) -> Plan:
    """Plans with the same one are lowered to programs that differ in lengths alone."""
    order = Plan()
    return replace(
        plan,
        dp=min(plan.dp, 2),
        pp=min(plan.pp, 2),
        micro=2 if plan.micro > 1 else 1,
        schedule=order.schedule,
        chunks=order.chunks,
    )


def _order(candidate: Candidate) -> tuple[object, ...]:
    prediction = candidate.prediction
    seconds = float("inf") if prediction is None else prediction.step_s
    # Of equals, the simplest: the one with the shortest text.
    return candidate.dropped is not None, seconds, len(str(candidate.plan)), str(candidate.plan)


def _reason(candidates: Sequence[Candidate], lightest: tuple[Plan, float] | None, budget_bytes: int) -> str:
    if not candidates:
        return "Nothing that is allowed can be chosen on these devices"
    if lightest is None:
        return candidates[0].dropped or ""
    plan, nbytes = lightest
    if nbytes <= budget_bytes:  # the others were dropped for other reasons
        return next((c.dropped for c in candidates if c.dropped), "")
    usable = f"of which {_size(budget_bytes)} may be used"
    return f'No plan fits: "{plan}" needs the least memory, {_size(nbytes)} a device, {usable}'


def _size(nbytes: float) -> str:
    return f"{nbytes / 2**30:.1f} GiB" if nbytes >= 2**30 else f"{nbytes / 2**20:.0f} MiB"
