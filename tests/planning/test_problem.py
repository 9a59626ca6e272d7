"""The step to plan for, as the search is asked about it."""

from __future__ import annotations

import pytest

from moai.lower.sampling import observe
from moai.plan.plan import Plan
from moai.plan.work import Stages
from moai.planning import problem
from tests.capture.conftest import capture, on_the_host, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import capturing, llama_with_adamw, sizes


@on_the_host
@pytest.mark.parametrize("n", [4, 8])
def test_the_search_knows_how_many_layers_can_be_dealt_to_stages(n, capture, monkeypatch):  # noqa: F811
    graph = capturing(capture, monkeypatch)(llama_with_adamw(8, 32, times=2, **sizes(n))).graph
    stages = observe(graph, Plan(pp=2, micro=2))
    assert isinstance(stages, Stages)
    assert problem.step(graph, [None] * len(graph.inputs)).layers == stages.layers == n
