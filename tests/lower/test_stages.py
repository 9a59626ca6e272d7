"""Stages of a pipeline: whatever their number, a step gives the numbers of one device (fp64, to 1e-10)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moai.lower import Program, lower
from moai.lower.operators import is_view
from moai.lower.validate import InvalidProgram, validate
from moai.plan.errors import PlanError
from moai.plan.plan import Plan
from tests.lower.lockstep import run
from tests.lower.step_tracing import trace
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
PLANS: tuple[Any, ...] = (
    Plan(pp=2),
    Plan(pp=2, micro=2),
    Plan(pp=2, micro=4, schedule="gpipe"),
    Plan(pp=2, micro=4),
    Plan(pp=2, micro=4, recompute="full"),
    Plan(pp=2, micro=4, schedule="zero_bubble"),
    Plan(pp=2, micro=3, dp=2, schedule="zero_bubble", recompute="full", **LOW),
    Plan(pp=2, micro=4, schedule="interleaved"),
    pytest.param(Plan(pp=2, micro=3, tp=2, schedule="interleaved", recompute="default"), marks=pytest.mark.slow),
    Plan(pp=2, dp=2, micro=3),
    Plan(pp=2, tp=2, micro=2),
    Plan(pp=2, dp=2, micro=2, **SHARDED),
    Plan(pp=2, dp=2, micro=2, **LOW),
    Plan(pp=2, dp=2, tp=2, micro=2, recompute="default", **LOW),
)


@pytest.fixture(autouse=True)
def _small_states_are_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moai.lower.inputs._MIN_STATE", 1)


def trained(loss: Callable[..., torch.Tensor], n: int, most: float | None = None) -> Callable[..., Any]:
    """A step of SGD on the first `n` tensors, which gives its loss. `most`: the norm that gradients are clipped to."""

    def step(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state, batch = args[:n], args[n:]
        params = leaves(state)
        found = loss(params, *batch)
        grads = gradients(found, params)
        if most is not None:
            total = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
            grads = torch._foreach_mul(grads, torch.clamp(most / (total + 1e-6), max=1.0))
            sgd(state, grads)
            return found.detach(), total
        sgd(state, grads)
        return (found.detach(),)

    return step


def layers(n: int, width: int = 8) -> list[torch.Tensor]:
    return [torch.randn(width, width) / width**0.5 for _ in range(n)]


def stacked(params: Tensors, x: torch.Tensor) -> torch.Tensor:
    for w in params:
        x = x + F.linear(x, w).tanh()
    return x.square().mean()


def stacked_program(n: int, plan: Plan, samples: int = 16, width: int = 8) -> Program:
    state, x = layers(n, width), torch.randn(samples, 32, width)
    return lower(trace(trained(stacked, n), state, [x]), plan, [None] * (n + 1))


def sends(program: Program) -> list[tuple[int, int, int]]:
    """(stage, stage that it sends to, tensors) of every message in a pass, and outside of loops."""
    return [
        (stage, i.args[1], len(i.args[0]))
        for stage in range(len(program.stages))
        for i in program.of(stage).instructions
        if i.op == "send"
    ]


# -- numbers


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_weights_that_two_stages_share_have_one_gradient_and_one_update(plan: Plan) -> None:
    state = transformer_state(plan.n_stages if plan.schedule == "interleaved" else 2)
    check(trained(transformer_loss, len(state)), state, transformer_batch(13), [plan])


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero_bubble"])
@pytest.mark.parametrize("stages", [2, 3, 4, 6])
def test_any_number_of_stages_gives_the_numbers_of_one_device(stages: int, schedule: Any) -> None:
    plans = [Plan(pp=stages, micro=micro, schedule=schedule) for micro in (1, 2, 5)]
    check(trained(stacked, 6), layers(6), [torch.randn(11, 8)], plans)


@pytest.mark.parametrize(("devices", "chunks"), [(2, 2), (2, 3), (3, 2)])
def test_any_number_of_stages_a_device_gives_the_numbers_of_one_device(devices: int, chunks: int) -> None:
    plans = [Plan(pp=devices, micro=micro, schedule="interleaved", chunks=chunks) for micro in (1, 2, 5)]
    check(trained(stacked, 6), layers(6), [torch.randn(11, 8)], plans)


@pytest.mark.parametrize("plan", [Plan(pp=3, micro=2), Plan(pp=2, dp=2, micro=2, **SHARDED)], ids=str)
def test_gradients_are_clipped_by_the_norm_over_all_stages(plan: Plan) -> None:
    check(trained(stacked, 6, most=0.01), layers(6), [torch.randn(11, 8)], [plan])


@pytest.mark.parametrize("plan", [Plan(pp=2), Plan(pp=3, dp=2, tp=2)], ids=str)
def test_evaluation_runs_through_the_stages(plan: Plan) -> None:
    check(lambda *args: (stacked(args[:-1], args[-1]),), layers(6), [torch.randn(11, 8)], [plan])


def test_a_skip_connection_over_a_stage_is_sent_past_it() -> None:
    def skipping(params: Tensors, x: torch.Tensor) -> torch.Tensor:
        first = F.linear(x, params[0])
        h = first
        for w in params[1:]:
            h = F.linear(h, w).tanh()
        return (h * first).mean()

    check(trained(skipping, 6), layers(6), [torch.randn(11, 8)], [Plan(pp=3, micro=2), Plan(pp=3)])


def test_two_batches_whose_gradients_the_script_adds_up_run_on_the_same_stages() -> None:
    def both(params: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return stacked(params, x) + stacked(params, y)

    plan = Plan(pp=2, micro=2)
    check(trained(both, 4), layers(4), [torch.randn(8, 8), torch.randn(8, 8)], [plan])


# -- what is where


def test_a_stage_has_its_own_states_alone() -> None:
    program = stacked_program(6, Plan(pp=3, micro=2))
    assert [s.placement.stages for s in program.inputs[:-1]] == [(0,), (0,), (1,), (1,), (2,), (2,)]
    assert [len(stage.inputs) for stage in program.stages] == [3, 2, 2]  # and the first one the batch


def test_an_update_is_where_its_state_lives() -> None:
    program = stacked_program(6, Plan(pp=3, micro=2))
    assert all(o.placement.stages == program.inputs[o.replaces].placement.stages for o in program.outputs[1:])
    assert program.outputs[0].placement.stages == (2,)  # the loss


def test_a_bias_behind_all_else_of_its_stage_is_updated_there() -> None:
    def step(*args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        params, momenta, x = leaves(args[:8]), args[8:16], args[16]
        for w, b in zip(params[::2], params[1::2], strict=True):
            x = x + F.linear(x.tanh(), w, b)
        grads = gradients(x.square().mean(), params)
        torch._foreach_mul_(momenta, 0.9)
        torch._foreach_add_(momenta, grads)
        torch._foreach_add_(args[:8], momenta, alpha=-0.1)
        return (x.detach().mean(),)

    state = [t for w in layers(4) for t in (w, torch.zeros(8))]
    state += [torch.zeros_like(t) for t in state]
    program = lower(trace(step, state, [torch.randn(16, 8)]), Plan(pp=2, micro=4), [None] * 17)
    assert [s.placement.stages for s in program.inputs[:16]] == ([(0,)] * 4 + [(1,)] * 4) * 2


def test_states_stay_where_they_live() -> None:
    state, x = layers(6), torch.randn(16, 8)
    graph = trace(trained(stacked, 6), state, [x])
    first = lower(graph, Plan(pp=2, micro=2), [None] * 7)
    moved = [replace(s.placement, stages=(0,) if k < 4 else (1,)) for k, s in enumerate(first.inputs[:6])]
    program = lower(graph, Plan(pp=2, micro=2), [*moved, None])
    assert [s.placement.stages for s in program.inputs[:6]] == [(0,)] * 4 + [(1,)] * 2
    for a, b in zip(run(program, [*state, x]), run(first, [*state, x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_stage_sends_one_activation_on_and_one_gradient_back() -> None:
    assert Counter(sends(stacked_program(6, Plan(pp=3, micro=4)))) == {
        (0, 1, 1): 1,
        (1, 2, 1): 1,
        (2, 1, 1): 1,
        (1, 0, 1): 1,
    }


def test_of_tied_weights_one_copy_and_one_gradient_cross_in_a_step() -> None:
    state = transformer_state()
    graph = trace(trained(transformer_loss, len(state)), state, transformer_batch(8))
    program = lower(graph, Plan(pp=2, micro=4), [None] * len(graph.inputs))
    assert program.inputs[0].placement.stages == (0,)
    first, last = (program.of(s).instructions for s in (0, 1))
    begin, end = (next(k for k, i in enumerate(first) if i.op == op) for op in ("repeat", "end_repeat"))
    outside = [i.op for k, i in enumerate(first) if not begin < k < end]
    assert outside.count("send") == 1 and outside.count("receive") == 1
    assert (
        sum(i.op == "send" for i in last) == 2
    )  # in a pass the gradient of an activation, behind them that of weights


def test_memory_falls_with_the_number_of_stages() -> None:
    one, two, four = (stacked_program(12, Plan(pp=stages, micro=12), 12, width=128) for stages in (1, 2, 4))
    assert one.resident_bytes > 1.6 * two.resident_bytes > 2.2 * four.resident_bytes
    assert one.peak_bytes > 1.5 * two.peak_bytes > 2.0 * four.peak_bytes


def test_zero_bubble_and_chunks_change_no_more_than_the_order() -> None:
    """Nothing is computed twice, but for views of what parts hand on."""

    def work(plan: Plan) -> Counter[str]:
        code = [i for stage in stacked_program(8, plan).stages for i in stage.instructions]
        return Counter(i.op for i in code if i.op.startswith("aten.") and not is_view(i.op))

    expected = work(Plan(pp=2, micro=4))
    assert work(Plan(pp=2, micro=4, schedule="zero_bubble")) == expected
    assert work(Plan(pp=2, micro=4, schedule="interleaved")) == expected


def test_zero_bubble_sends_before_it_makes_gradients_of_weights() -> None:
    second = stacked_program(4, Plan(pp=2, micro=4, schedule="zero_bubble")).of(1).instructions
    begins = [at for at, i in enumerate(second) if i.op == "begin_part"]
    end = next(at for at, i in enumerate(second) if i.op == "end_repeat")
    parts = [[i.op for i in second[a:b]] for a, b in pairwise([*begins, end])]
    assert "send" in parts[1] and "accumulate" not in parts[1]
    assert parts[2].count("accumulate") == parts[2].count("aten.mm.default") == 2


def test_1f1b_holds_fewer_micro_batches_than_gpipe() -> None:
    found = {s: stacked_program(4, Plan(pp=2, micro=16, schedule=s)).stages for s in ("gpipe", "1f1b")}
    assert all(a.peak_bytes > 2 * b.peak_bytes for a, b in zip(found["gpipe"], found["1f1b"], strict=True))


# -- what cannot be


@pytest.mark.parametrize(
    ("n", "plan", "reason", "nearest"),
    [
        (4, Plan(pp=5, micro=5), "there are more stages than layers, of which the model has 4", Plan(dp=5, micro=5)),
        (
            4,
            Plan(pp=3, micro=5, schedule="interleaved"),
            "pp=3,chunks=2: there are more stages than layers",
            Plan(dp=3, micro=5),
        ),
        (4, Plan(dp=1, pp=8, micro=8), "there are more stages than layers", Plan(dp=2, pp=4, micro=8)),
        (2, Plan(pp=16, micro=16), "the model has too few operators", Plan(dp=2, pp=8, micro=16)),
        (4, Plan(pp=2, layers=(2, 3)), "layers=2+3 deals 5 layers, but the model has 4", Plan(pp=2)),
        (2, Plan(pp=2, dp=2, layers=(1, 1)), "it is not clear what the model's layers are", Plan(pp=2, dp=2)),
    ],
)
def test_stages_that_cannot_be_are_refused_with_the_reason_and_a_plan_that_can(n, plan, reason, nearest) -> None:
    with pytest.raises(PlanError) as caught:
        stacked_program(n, plan)
    assert reason in caught.value.reason
    assert caught.value.nearest == nearest


def test_stages_have_the_layers_that_the_plan_deals_to_them() -> None:
    program = stacked_program(6, Plan(pp=3, micro=3, layers=(1, 0, 2)))
    assert [len(stage.inputs) for stage in program.stages] == [2, 3, 2]  # the first one has the batch, too


def normed(params: Tensors, x: torch.Tensor) -> torch.Tensor:
    for up, down in zip(params[::2], params[1::2], strict=True):
        x = x + F.linear(F.gelu(F.linear(F.layer_norm(x, x.shape[-1:]), up)), down)
    return x.square().mean()


@pytest.mark.parametrize("recompute", ["default", "full"])
def test_what_is_computed_again_is_so_on_its_own_stage(recompute: Any) -> None:
    state, x = [w.float() for w in layers(8, 64)], torch.randn(16, 32, 64, dtype=torch.float32)
    graph = trace(trained(normed, 8), state, [x])
    kept, again = (
        lower(graph, Plan(pp=2, micro=2, recompute=r, precision="bf16"), [None] * 9) for r in ("none", recompute)
    )
    assert len(sends(again)) == len(sends(kept))


def test_data_of_various_batch_sizes_are_refused_with_the_reason() -> None:
    def loss(params: Tensors, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return stacked(params, x * mask)

    graph = trace(trained(loss, 4), layers(4), [torch.randn(16, 4, 8), torch.randn(1, 4, 8)])
    with pytest.raises(PlanError, match=r"pp=2: the step's data are of various batch sizes \(16, 1\)") as caught:
        lower(graph, Plan(pp=2, micro=2), [None] * 6)
    assert caught.value.nearest == Plan(dp=2, micro=2)


# -- checks


def test_64_stages_are_lowered_and_validated() -> None:
    program = stacked_program(64, Plan(pp=64, micro=96, dp=2), samples=192)
    assert program.mesh.n_devices == 128 and len(program.stages) == 64
    validate(program)


@pytest.mark.slow
@pytest.mark.parametrize(
    "plan",
    [Plan(pp=64, micro=96, schedule="zero_bubble"), Plan(pp=32, micro=70, schedule="interleaved")],
    ids=str,
)
def test_64_stages_of_other_schedules_are_lowered_and_validated(plan: Plan) -> None:
    validate(stacked_program(64, plan, samples=192))


def test_the_validator_finds_a_message_that_is_not_sent() -> None:
    program = stacked_program(4, Plan(pp=2, micro=2))
    silent = tuple(i for i in program.stages[0].instructions if i.op != "send")
    broken = replace(program, stages=(replace(program.stages[0], instructions=silent), program.stages[1]))
    with pytest.raises(InvalidProgram, match="waits forever"):
        validate(broken)
