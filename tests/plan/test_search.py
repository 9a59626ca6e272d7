"""The search finds what asking about every plan would find, and asks about few."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moai.graph.step_graph import StepGraph
from moai.lower.sampling import observe
from moai.plan.cluster import Cluster, DeviceModel, Link
from moai.plan.cost import INDISTINCT, Prediction, predict
from moai.plan.family import Family
from moai.plan.plan import Plan
from moai.plan.search import Choice, NoPlan, Step, search
from moai.plan.space import Allowed, layouts, variants
from moai.plan.timings import Described, groups
from moai.plan.work import Observation
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
def observed(plan: Plan) -> Observation:
    return observe(graph(), plan)


def every(over: Cluster) -> Mapping[Plan, Prediction]:
    """Each plan that can be run, predicted from an observation of its own."""
    timings = Described(over)
    plans = [p for layout in layouts(DEVICES, BATCH) if layout.pp == 1 for p in variants(layout)]
    return {p: predict(observed(p).sample(), p, timings, groups(p, over)) for p in plans}


def chosen(over: Cluster, budget: int) -> Choice:
    return search(Step(observed, BATCH), over, Described(over), budget, Allowed(), Plan())


def decades(least: int, most: int) -> st.SearchStrategy[float]:
    return st.floats(least, most).map(lambda power: 10.0**power)


@st.composite
def clusters(draw: st.DrawFn) -> Cluster:
    """Devices and links of any speeds, in one node or in two."""
    device = DeviceModel("any", "cpu", 1 << 30, draw(decades(8, 11)), {"fp32": draw(decades(8, 12))})
    inside, between = (Link(draw(decades(6, 11)), draw(decades(-6, -3))) for _ in range(2))
    nodes = draw(st.sampled_from([1, 2]))
    return Cluster("test", device, nodes, DEVICES // nodes, inside, between)


@settings(max_examples=60, deadline=None)
@given(clusters(), st.floats(0.0, 1.0))
def test_the_search_chooses_what_the_predictions_of_all_plans_would(over, share):
    plans = every(over)
    needs = sorted(found.memory.total for found in plans.values())
    budget = int(1.02 * needs[0] + share * (needs[-1] - needs[0]))
    assume(all(abs(need / budget - 1) > 0.01 for need in needs))  # what follows from others' memory is about right
    fitting = {plan: found.step_s for plan, found in plans.items() if found.memory.total <= budget}
    alike = [plan for plan, seconds in fitting.items() if seconds <= min(fitting.values()) * (1 + INDISTINCT)]
    choice = chosen(over, budget)
    assert choice.best.plan.dp == max(plan.dp for plan in alike)
    assert fitting[choice.best.plan] == pytest.approx(min(fitting[p] for p in alike if p.dp == choice.best.plan.dp))


@pytest.mark.parametrize("link", [1e7, 1e9])
def test_what_is_predicted_is_what_an_observation_of_its_own_gives(link):
    over = cluster(link)
    plans = every(over)
    for candidate in chosen(over, 1 << 40).candidates:
        if candidate.prediction is not None and candidate.plan in plans:
            assert candidate.prediction.step_s == pytest.approx(plans[candidate.plan].step_s, rel=1e-3)
            assert candidate.prediction.memory.total == pytest.approx(plans[candidate.plan].memory.total, rel=0.01)


@pytest.mark.parametrize("link", [1e7, 1e8, 1e9])
@pytest.mark.parametrize("budget", [1 << 20, 1 << 21, 1 << 22, 1 << 40])
def test_no_plan_is_faster_or_smaller_than_the_bound_that_it_was_dropped_for(link, budget):
    over = cluster(link)
    plans = every(over)
    try:
        candidates = chosen(over, budget).candidates
    except NoPlan as error:
        candidates = error.candidates
    for candidate in candidates:
        reason, found = candidate.dropped or "", plans.get(candidate.plan)
        if found is not None and reason.startswith("slower:"):
            assert found.step_s >= 0.995 * float(reason.split()[1]), candidate
        if found is not None and reason.startswith("memory:"):
            assert found.memory.total > budget, candidate


def test_what_cannot_be_run_yet_is_not_observed():
    asked: list[Plan] = []

    def noting(plan: Plan) -> Observation:
        asked.append(plan)
        return observed(plan)

    over = cluster(1e8)
    search(Step(noting, BATCH), over, Described(over), 1 << 40, Allowed(), Plan())
    assert len(asked) == len(set(asked)) < len(every(over)) / 2
    assert all(plan.pp == 1 for plan in asked)


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
