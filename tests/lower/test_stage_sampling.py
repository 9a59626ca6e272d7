"""What is observed of stages: what they do, and what of it no other stage waits for."""

from __future__ import annotations

from functools import cache

import numpy as np
import torch

from moai.graph.step_graph import StepGraph
from moai.lower.sampling import observe
from moai.plan.plan import Plan
from moai.plan.work import KINDS, Stages, StageWork
from tests.lower.step_tracing import phase, trace

BATCH, WIDTH, LAYERS = 32, 32, 8


def _step(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Two products a layer, between which is eight times as much; one batch."""
    weights, x = args[: 2 * LAYERS], args[-1]
    inner = [w.detach().requires_grad_() for w in weights]
    h = x
    for up, down in zip(inner[::2], inner[1::2], strict=True):
        h = h + (h @ up).tanh() @ down
    loss = h.square().mean()
    phase("backward")
    grads = torch.autograd.grad(loss, inner)
    phase("optimizer")
    for w, g in zip(weights, grads, strict=True):
        w.add_(g, alpha=-0.1)
    return (loss.detach(),)


@cache
def graph() -> StepGraph:
    weights = [torch.randn(*shape) / 8 for _ in range(LAYERS) for shape in ((WIDTH, 8 * WIDTH), (8 * WIDTH, WIDTH))]
    return trace(_step, weights, [torch.randn(BATCH, 64, WIDTH)])


def test_gradients_of_weights_alone_are_what_no_stage_waits_for() -> None:
    stages = observe(graph(), Plan(pp=2, micro=4))
    assert isinstance(stages, Stages)

    def products(each: StageWork, late: bool) -> int:
        its = each.work
        return int(np.sum((its.kind == KINDS.index("matmul")) & (its.phase == 1) & (its.late == late)))

    for each in (stages.middle, stages.deeper, stages.last):
        assert products(each, late=True) == products(each, late=False) == 2 * each.layers
    assert stages.deeper.late > stages.middle.late > 0
