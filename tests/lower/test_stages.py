"""Stages of a pipeline: whatever their number, a step gives the numbers of one device (fp64, to 1e-10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from moai.plan.plan import Plan
from tests.lower.test_one_device_numbers import (
    check,
    gradients,
    leaves,
    sgd,
    transformer_batch,
    transformer_loss,
    transformer_state,
)

Tensors = Sequence[torch.Tensor]
pytestmark = pytest.mark.usefixtures("double_precision")

SHARDED = {"distribute_param": True}
LOW = {"distribute_param": True, "distribute_low_prec_param": True}
PLANS = (
    Plan(pp=2),
    Plan(pp=2, micro=2),
    Plan(pp=2, micro=4, schedule="gpipe"),
    Plan(pp=2, micro=4),
    Plan(pp=2, micro=4, recompute="full"),
    Plan(pp=2, dp=2, micro=3),
    Plan(pp=2, tp=2, micro=2),
    Plan(pp=2, dp=2, micro=2, **SHARDED),
    Plan(pp=2, dp=2, micro=2, **LOW),
    Plan(pp=2, dp=2, tp=2, micro=2, recompute="default", **LOW),
)


@pytest.fixture(autouse=True)
def _small_states_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moai.lower.inputs._MIN_STATE", 1)


def trained(loss: Callable[..., torch.Tensor], n: int) -> Callable[..., Any]:
    """A step of SGD on the first `n` tensors, which gives its loss."""

    def step(*args: torch.Tensor) -> tuple[torch.Tensor]:
        state, batch = args[:n], args[n:]
        params = leaves(state)
        found = loss(params, *batch)
        sgd(state, gradients(found, params))
        return (found.detach(),)

    return step


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_weights_that_two_stages_share_have_one_gradient_and_one_update(plan: Plan) -> None:
    state = transformer_state()
    check(trained(transformer_loss, len(state)), state, transformer_batch(13), [plan])
