"""Rows that a step sorts by their expert stay where they are, if that makes no difference."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import transformers
from torch import nn

from moai.lower import lower
from moai.lower.experts import without_sorts
from moai.lower.lowering import lowered
from moai.lower.tasks import tasks
from moai.plan.plan import Plan
from tests.capture.conftest import capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import capturing, language_model, sizes, train

aten = torch.ops.aten
moai = torch.ops.moai

ROWS, WIDTH, EXPERTS = 24, 8, 4
Rows = torch.Tensor


@pytest.fixture
def steps(capture, monkeypatch):  # noqa: F811
    return capturing(capture, monkeypatch)


def mixture(config: transformers.PretrainedConfig) -> Callable[[str], None]:
    return language_model(config, "grouped_mm")


MIXTURES = {
    "mixtral": mixture(transformers.MixtralConfig(num_local_experts=EXPERTS, **sizes(2))),
    "mixtral with more experts than rows are for": mixture(
        transformers.MixtralConfig(num_local_experts=64, **sizes(1))
    ),
    "mixtral with a loss of its router": mixture(
        transformers.MixtralConfig(num_local_experts=EXPERTS, output_router_logits=True, **sizes(2))
    ),
    "qwen3_moe": mixture(
        transformers.Qwen3MoeConfig(num_experts=EXPERTS, num_experts_per_tok=2, moe_intermediate_size=48, **sizes(2))
    ),
}


class Sorting(nn.Module):
    """`use` is given rows in the order of their experts, and that order."""

    def __init__(self, use: Callable[[Rows, torch.Tensor, Rows], Rows]) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.use = use

    def forward(self, x: Rows, experts: torch.Tensor) -> Rows:
        order = experts.argsort()
        return self.use(self.linear(x)[order], order, x)


def sorting(use: Callable[[Rows, torch.Tensor, Rows], Rows]) -> Callable[[str], None]:
    def script(device: str) -> None:
        torch.manual_seed(0)
        net = Sorting(use).double().to(device)
        x, experts = (
            torch.randn(ROWS, WIDTH, dtype=torch.float64).to(device),
            torch.randint(0, EXPERTS, (ROWS,)).to(device),
        )
        train(net, lambda: net(x, experts).pow(2).sum())

    return script


def back(rows: Rows, order: torch.Tensor) -> Rows:
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(ROWS, device=order.device)
    return rows[inverse]


def rewritten(step):
    return without_sorts(*step._canonical)[0]


def sorts(nodes) -> int:
    return sum(node.op in (aten.sort.default, aten.sort.stable) for node in nodes)


@pytest.mark.parametrize("name", MIXTURES)
def test_a_mixture_of_experts_needs_no_sort(steps, name: str) -> None:
    step = steps(MIXTURES[name])
    nodes = rewritten(step)
    assert sorts(step.nodes) > 0
    assert sorts(nodes) == 0
    assert {moai.rows_mm.default, moai.rows_outer.default} <= {node.op for node in nodes}


@pytest.mark.parametrize("name", MIXTURES)
def test_its_results_are_the_same_but_for_rounding(steps, name: str) -> None:
    step = steps(MIXTURES[name])
    expected, _ = step.run(step.nodes)
    found, _ = step.run(rewritten(step))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


ALIKE = {
    "put back by their places": lambda rows, order, x: back(torch.tanh(rows), order),
    "put back by sorting the order": lambda rows, order, x: torch.tanh(rows)[order.argsort()],
    "put back by adding": lambda rows, order, x: torch.zeros_like(x).index_put((order,), rows.exp(), accumulate=True),
    "added up": lambda rows, order, x: rows.exp().sum(0),
    "with others in the same order": lambda rows, order, x: back(rows * x[order], order),
    "with what is the same for all": lambda rows, order, x: back(
        rows + torch.ones(ROWS, WIDTH, device=x.device), order
    ),
}

APART = {
    "summed from the first on": lambda rows, order, x: rows.cumsum(0),
    "with rows in another order": lambda rows, order, x: rows + x,
    "some of them": lambda rows, order, x: rows[: ROWS // 2],
    "reversed": lambda rows, order, x: rows.flip(0),
    "flattened": lambda rows, order, x: rows.reshape(ROWS // 2, 2 * WIDTH),
    "times their places": lambda rows, order, x: rows * order[:, None],
    "with themselves put back": lambda rows, order, x: rows * back(rows, order),
    "put back twice": lambda rows, order, x: back(back(rows, order), order),
    "put where they were not": lambda rows, order, x: torch.zeros_like(x).index_put((order.flip(0),), rows),
}


@pytest.mark.parametrize("name", ALIKE)
def test_rows_that_are_treated_one_by_one_are_not_sorted(steps, name: str) -> None:
    step = steps(sorting(ALIKE[name]))
    nodes = rewritten(step)
    assert sorts(nodes) == 0
    for a, b in zip(step.run(nodes)[0], step.run(step.nodes)[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", APART)
def test_rows_whose_order_matters_are_sorted(steps, name: str) -> None:
    step = steps(sorting(APART[name]))
    assert rewritten(step) == step.nodes


def test_rows_that_come_out_of_the_step_are_sorted(steps) -> None:
    kept = []

    def use(rows: Rows, order: torch.Tensor, x: Rows) -> Rows:
        kept.append(rows.detach())
        return back(rows, order)

    step = steps(sorting(use))
    assert sorts(rewritten(step)) == 1


def test_each_device_multiplies_its_own_rows_only(steps) -> None:
    graph = steps(MIXTURES["mixtral"]).graph

    def flops(plan: Plan) -> float:
        """Of the backward: what the embedding gave was there before this step."""
        found = lowered(graph, plan, [None] * len(graph.inputs))
        done = tasks(found.program, found.types, found.phases, fused=False)
        return sum(task.flops for task in done if task.phase == "backward")

    assert flops(Plan(dp=4)) == pytest.approx(flops(Plan()) / 4, rel=1e-6)


def test_no_operator_of_it_is_computed_whole(steps) -> None:
    graph = steps(MIXTURES["qwen3_moe"]).graph
    assert not lower(graph, Plan(dp=2, tp=2), [None] * len(graph.inputs)).notes


def test_a_device_that_has_the_whole_batch_sorts_it_once(steps) -> None:
    graph = steps(MIXTURES["mixtral"]).graph
    program = lower(graph, Plan(tp=2), [None] * len(graph.inputs))
    assert any(i.op.startswith("aten.sort") for i in program.instructions)
