"""Steps captured from models, as stages of a pipeline: they give one device's numbers (to 1e-6: parts are in fp32)."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moai.lower import lower
from moai.plan.plan import Plan
from tests.capture.conftest import Observed, capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import SCRIPTS, Step, capturing
from tests.lower.lockstep import run

pytestmark = pytest.mark.usefixtures("double_precision")
PLANS = (
    Plan(pp=2),
    Plan(pp=2, micro=2),
    Plan(pp=2, dp=2, micro=2, recompute="full", distribute_param=True),
    Plan(pp=3, micro=3, recompute="default", schedule="gpipe"),
)


@pytest.fixture
def step_of(capture: Observed, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Step]:  # noqa: F811
    return capturing(capture, monkeypatch)


@pytest.mark.parametrize("name", [n for n in SCRIPTS if n != "one_layer"])
@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_stages_of_a_model_give_one_devices_numbers(step_of: Callable[[str], Step], name: str, plan: Plan) -> None:
    step = step_of(name)
    inputs = [step.given[i.id] for i in step.graph.inputs]
    program = lower(step.graph, plan, [None] * len(inputs))
    expected = run(lower(step.graph, Plan(), [None] * len(inputs)), [x.clone() for x in inputs], step.scalars)
    found = run(program, [x.clone() for x in inputs], step.scalars)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
