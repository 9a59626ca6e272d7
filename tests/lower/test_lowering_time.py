"""Lowering takes little time, and for a model of twice the layers twice of it.

Time is that of the process, so that other programs disturb little. How it grows is seen in calls of functions, which
are the same on every machine. Figures by depth: `python -m benchmarks.lowering`.
"""

from __future__ import annotations

import cProfile
import time

import pytest

from moai.lower import lower
from moai.plan.plan import Plan
from tests.capture.conftest import capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import Step, capturing, llama

SECONDS_PER_1000_NODES = 0.3
SHALLOW, DEEP = llama(2), llama(8)

PLANS = [
    Plan(dp=8),
    Plan(dp=4, tp=2),
    Plan(dp=2, micro=4),
    Plan(dp=8, distribute_param=True, distribute_low_prec_param=True),
    Plan(dp=2, recompute="default"),
    Plan(dp=2, recompute="full"),
    Plan(dp=2, precision="bf16"),
]


@pytest.fixture
def steps(capture, monkeypatch):  # noqa: F811
    monkeypatch.setenv("MOAI_VALIDATE", "0")  # which lowers nothing, and takes its time
    return capturing(capture, monkeypatch)


def lowered(step: Step, plan: Plan) -> None:
    lower(step.graph, plan, [None] * len(step.graph.inputs))


def calls_per_node(step: Step, plan: Plan) -> float:
    """Calls of functions, of Python and of C, for each node of the graph."""
    profile = cProfile.Profile()
    profile.runcall(lowered, step, plan)
    return sum(entry.callcount for entry in profile.getstats()) / len(step.graph.nodes)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_a_thousand_nodes_take_less_than_a_third_of_a_second(steps, plan):
    step = steps(DEEP)

    def seconds() -> float:
        begin = time.process_time()
        lowered(step, plan)
        return time.process_time() - begin

    # Who shares the core's caches can only make it slower: one undisturbed time of ten is enough.
    assert any(seconds() / len(step.graph.nodes) * 1000 < SECONDS_PER_1000_NODES for _ in range(10))


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_time_grows_with_the_layers_and_not_with_their_square(steps, plan):
    shallow, deep = steps(SHALLOW), steps(DEEP)
    lowered(shallow, plan)  # what is worked out once for each operator
    assert calls_per_node(deep, plan) < 1.05 * calls_per_node(shallow, plan)
