"""The search finds what asking about every plan would find, and asks about few."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moai.graph.step_graph import StepGraph
from moai.lower.sampling import observe
from moai.plan.cluster import Cluster, DeviceModel, Link
from moai.plan.cost import INDISTINCT, predict
from moai.plan.family import Family, Observed
from moai.plan.plan import Plan
from moai.plan.prediction import Prediction
from moai.plan.search import Choice, NoPlan, Step, search
from moai.plan.space import Allowed, plans
from moai.plan.timings import Described, groups
from moai.plan.work import Stages
from tests.lower.step_tracing import phase, trace

BATCH, WIDTH, LAYERS = 16, 64, 4
DEVICES = 4


def _step(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Layers with their momenta; one batch."""
    weights, momenta, x = args[: 2 * LAYERS], args[2 * LAYERS : -1], args[-1]
    inner = [w.detach().requires_grad_() for w in weights]
    h = x
    for up, down in zip(inner[::2], inner[1::2], strict=True):
        h = h + (h @ up).tanh() @ down
    loss = h.square().mean()
    phase("backward")
    grads = torch.autograd.grad(loss, inner)
    phase("optimizer")
    for w, m, g in zip(weights, momenta, grads, strict=True):
        m.mul_(0.9).add_(g)
        w.add_(m, alpha=-0.1)
    return (loss.detach(),)


@cache
def graph() -> StepGraph:
    weights = [torch.randn(*shape) / 8 for _ in range(LAYERS) for shape in ((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))]
    return trace(_step, [*weights, *map(torch.zeros_like, weights)], [torch.randn(BATCH, 8, WIDTH)])


def cluster(link: float, memory_bandwidth: float = 1e9) -> Cluster:
    """Slow devices, for which this step is long; `link`: bytes/s."""
    device = DeviceModel("slow", "cpu", 1 << 30, memory_bandwidth, {"fp32": 1e9})
    return Cluster("test", device, 2, DEVICES // 2, Link(link, 1e-5), Link(link / 4, 1e-4))


@cache
def observed(plan: Plan) -> Observed:
    return observe(graph(), plan)


def every(over: Cluster, budget: float = math.inf) -> Mapping[Plan, Prediction]:
    """Each plan, predicted from an observation of its own."""
    timings = Described(over)
    every = plans(DEVICES, BATCH, LAYERS)
    return {p: predict(observed(p).sample(), p, timings, groups(p, over), budget_bytes=budget) for p in every}


def undealt(plan: Plan) -> Plan:
    """The plan that was asked about, before layers were dealt."""
    return replace(plan, layers=None)


def chosen(over: Cluster, budget: int) -> Choice:
    return search(Step(observed, BATCH, layers=LAYERS), over, Described(over), budget, Allowed(), Plan())


def decades(least: int, most: int) -> st.SearchStrategy[float]:
    return st.floats(least, most).map(lambda power: 10.0**power)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Devices and links of any speeds, in one node or in two."""
    device = DeviceModel("any", "cpu", 1 << 30, draw(decades(8, 11)), {"fp32": draw(decades(8, 12))})
    inside, between = (Link(draw(decades(6, 11)), draw(decades(-6, -3))) for _ in range(2))
    nodes = draw(st.sampled_from([1, 2]))
    return Cluster("test", device, nodes, DEVICES // nodes, inside, between)


@settings(max_examples=4, deadline=None)
@given(clusters(), st.floats(0.0, 1.0))
def test_the_search_chooses_what_the_predictions_of_all_plans_would(over, share):
    check_the_choice(over, share)


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(clusters(), st.floats(0.0, 1.0))
def test_the_search_chooses_what_the_predictions_of_all_plans_would_on_many_clusters(over, share):
    check_the_choice(over, share)


def check_the_choice(over: Cluster, share: float) -> None:
    """On these devices, with this share of the memory that all plans need."""
    needs = sorted(found.memory.total for found in every(over).values())
    budget = int(1.02 * needs[0] + share * (needs[-1] - needs[0]))
    plans = every(over, budget)
    # what follows from others' memory is about right
    assume(all(abs(found.memory.total / budget - 1) > 0.01 for found in plans.values()))
    fitting = {plan: found.step_s for plan, found in plans.items() if found.memory.total <= budget}
    plain = {plan: seconds for plan, seconds in fitting.items() if plan.schedule == Plan().schedule}
    if min(fitting.values()) < min(plain.values()):
        # Where it fits without stages, the other orders are asked about only if the plainest may be faster.
        sure = plain if any(plan.pp == 1 for plan in plain) else fitting
        assert fitting[undealt(chosen(over, budget).best.plan)] <= min(sure.values()) * (1 + INDISTINCT)
        return
    alike = [plan for plan, seconds in fitting.items() if seconds <= min(fitting.values()) * (1 + INDISTINCT)]
    best = undealt(chosen(over, budget).best.plan)
    stages = min(plan.pp for plan in alike)
    safest = [plan for plan in alike if plan.pp == stages]
    assert (best.pp, best.dp) == (stages, max(plan.dp for plan in safest))
    assert fitting[best] == pytest.approx(min(fitting[plan] for plan in safest if plan.dp == best.dp))


@pytest.mark.parametrize("link", [1e7, 1e9])
def test_what_is_predicted_is_what_an_observation_of_its_own_gives(link):
    over = cluster(link)
    plans = every(over)
    for candidate in chosen(over, 1 << 40).candidates:
        if candidate.prediction is not None:
            own = plans[undealt(candidate.plan)]
            assert candidate.prediction.step_s == pytest.approx(own.step_s, rel=1e-3)
            assert candidate.prediction.memory.total == pytest.approx(own.memory.total, rel=0.01)


@pytest.mark.parametrize("link", [1e7, 1e8, 1e9])
@pytest.mark.parametrize("budget", [1 << 20, 1 << 21, 1 << 22, 1 << 40])
def test_no_plan_is_faster_or_smaller_than_the_bound_that_it_was_dropped_for(link, budget):
    over = cluster(link)
    plans = every(over, budget)
    try:
        candidates = chosen(over, budget).candidates
    except NoPlan as error:
        candidates = error.candidates
    for candidate in candidates:
        reason, found = candidate.dropped or "", plans[undealt(candidate.plan)]
        if reason.endswith("s or more"):
            assert found.step_s >= 0.995 * float(reason.split()[-4]), candidate
        if reason.startswith("memory:"):
            assert found.memory.total > budget, candidate


def test_few_plans_are_observed_and_none_twice():
    asked: list[Plan] = []

    def noting(plan: Plan) -> Observed:
        asked.append(plan)
        return observed(plan)

    over = cluster(1e8)
    search(Step(noting, BATCH, layers=LAYERS), over, Described(over), 1 << 40, Allowed(), Plan())
    assert len(asked) == len(set(asked)) < len(every(over)) / 4


def test_where_links_are_slow_layers_are_dealt_to_stages():
    step, over = Step(observed, BATCH, layers=LAYERS), cluster(1e5)
    best = search(step, over, Described(over), 1 << 40, Allowed(tp=1), Plan()).best
    assert best.plan.pp > 1 and best.plan.layers is not None and sum(best.plan.layers) == LAYERS
    assert [stage.layers for stage in best.prediction.stages] == list(best.plan.layers)


def test_of_several_orders_the_one_that_is_asked_for_is_taken_and_else_the_fastest():
    step, over = Step(observed, BATCH, layers=LAYERS), cluster(1e6)
    taken = {
        order: search(step, over, Described(over), 1 << 40, Allowed(pp=2, schedule=order), Plan()).best
        for order in ("1f1b", "gpipe", "zero_bubble", "interleaved", None)
    }
    assert all(order in (None, best.plan.schedule) for order, best in taken.items())
    seconds = {order: best.prediction.step_s for order, best in taken.items()}
    assert seconds[None] <= min(seconds.values()) * (1 + INDISTINCT)
    chunks = search(step, over, Described(over), 1 << 40, Allowed(pp=2, chunks=2), Plan()).candidates
    assert {c.plan.schedule for c in chunks} == {"interleaved"}


def test_a_stage_that_has_no_room_hands_layers_on():
    plan, over = Plan(pp=2, micro=8), cluster(1e6)
    stages = observed(plan)
    assert isinstance(stages, Stages)
    held = stages.first.held
    table = replace(held, total=held.total + (500 << 10))  # beside the first layers
    sample = replace(stages, first=replace(stages.first, held=table))

    def dealt(budget: float) -> list[int]:
        found = predict(sample, plan, Described(over), groups(plan, over), budget_bytes=budget)
        assert all(stage.memory.total <= budget for stage in found.stages)
        return [stage.layers for stage in found.stages]

    assert dealt(1500 << 10) == [2, 2]
    assert dealt(1300 << 10) == [1, 3]


def test_three_observations_tell_about_a_family():
    family = Family(observed, BATCH)
    for dp, micro in ((2, 2), (2, 4), (4, 2)):
        family.sample(Plan(dp=dp, micro=micro, distribute_param=True))
    plan = Plan(dp=4, micro=4, distribute_param=True)
    sample, own = family.known(plan), observed(plan).sample()
    assert sample is not None
    assert sample.less.flops.sum() == pytest.approx(own.less.flops.sum())
    assert sample.less.message.sum() == pytest.approx(own.less.message.sum())
    assert sample.less.memory.total == pytest.approx(own.less.memory.total, rel=0.01)
    assert family.known(Plan(dp=8, micro=2, distribute_param=True)) is not None
