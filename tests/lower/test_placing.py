"""How nodes are placed: which split wins, what waits, what is made in parts, what kernels are given."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moai.graph.placement import REPLICATE, Placement, Shard, split_evenly
from moai.lower import Program, lower
from moai.plan.plan import Plan
from tests.lower.lockstep import run
from tests.lower.sections import messages, ops
from tests.lower.step_tracing import phase, single, trace

aten = torch.ops.aten
TP = Placement(partial=("tp",))

pytestmark = pytest.mark.usefixtures("double_precision")


def split(dim: int, length: int, axis: str = "tp", parts: int = 2) -> Placement:
    return Placement((Shard(dim, (axis,), split_evenly(length, parts)),))


def lowered(fn: Callable[..., Any], plan: Plan, *given: tuple[torch.Tensor, Placement | None]) -> Program:
    """The program of `fn` of tensors that lie as told; it has been seen to give one device's numbers."""
    tensors = [t for t, _ in given]
    program = lower(trace(fn, tensors, []), plan, [p for _, p in given])
    for a, b in zip(run(program, tensors), fn(*tensors), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    return program


# -- which split wins


def test_a_whole_tensor_that_meets_a_split_one_is_cut_for_nothing():
    x, w = torch.randn(8, 6), torch.randn(6, 4)
    program = lowered(lambda x, w: (x @ w,), Plan(tp=2), (x, REPLICATE), (w, split(1, 4)))
    assert messages(program.instructions) == []
    assert program.outputs[0].placement == split(1, 4)


def test_of_two_tensors_that_are_split_differently_the_smaller_one_moves():
    large, small = torch.randn(64, 8), torch.randn(8, 8)
    program = lowered(lambda a, b: (a @ b,), Plan(tp=2), (large, split(0, 64)), (small, split(1, 8)))
    assert [i.args[0].id for i in program.instructions if i.op == "all_gather"] == [program.inputs[1].id]


def test_two_dims_are_split_over_two_axes_at_once():
    x, w = torch.randn(8, 6), torch.randn(6, 4)
    program = lowered(lambda x, w: (x @ w,), Plan(dp=2, tp=2), (x, split(0, 8, "dp")), (w, split(1, 4)))
    assert messages(program.instructions) == []
    assert str(program.outputs[0].placement) == "S0(dp) S1(tp)"


@pytest.mark.parametrize("softmax", [torch.softmax, torch.ops.aten._safe_softmax], ids=["plain", "safe"])
def test_an_operator_that_needs_a_dim_whole_gathers_it_and_no_other(softmax: Callable[..., torch.Tensor]):
    x = torch.randn(8, 6)
    along = lowered(lambda x: (softmax(x, 1),), Plan(tp=2), (x, split(1, 6)))
    across = lowered(lambda x: (softmax(x, 0),), Plan(tp=2), (x, split(1, 6)))
    assert [m[0] for m in messages(along.instructions)] == ["all_gather"]
    assert messages(across.instructions) == []


# -- what waits


def test_terms_of_two_products_are_added_before_they_are_summed():
    x, w = torch.randn(8, 6), torch.randn(6, 4)
    program = lowered(
        lambda x, w, v: ((x @ w + x @ v).exp(),),
        Plan(tp=2),
        (x, split(1, 6)),
        (w, split(0, 6)),
        (torch.randn(6, 4), split(0, 6)),
    )
    assert [m[0] for m in messages(program.instructions)] == ["all_reduce"]


def test_a_bias_is_added_once_to_what_is_left_in_terms():
    def step(x, w, b):
        y = torch.addmm(b, x, w).exp()
        b.sub_(1.0)  # it is trained
        return (y,)

    x, w, b = torch.randn(64, 6), torch.randn(6, 1), torch.randn(1)
    program = lower(trace(step, [x, w, b], []), Plan(tp=2), [split(1, 6), split(0, 6), REPLICATE])
    assert [m[0] for m in messages(program.instructions)] == ["all_reduce"]
    assert ops(program.instructions)["mul"] + ops(program.instructions)["mul_"] == 1, "the bias is one device's term"


def test_what_may_be_infinite_is_added_to_the_sum():
    x, w, mask = torch.randn(64, 6), torch.randn(6, 4), torch.tensor([0.0, -torch.inf, 0.0, -torch.inf])
    given = (x, split(1, 6)), (w, split(0, 6)), (mask, REPLICATE)
    program = lowered(lambda x, w, mask: (x @ w + mask,), Plan(tp=2), *given)
    assert ops(program.instructions)["mul"] + ops(program.instructions)["mul_"] == 0


def test_a_maximum_over_a_split_dim_is_that_of_the_maxima():
    x = torch.randn(8, 6)
    program = lowered(lambda x: (x.amax(1, True),), Plan(tp=2), (x, split(1, 6)))
    (one,) = [i for i in program.instructions if i.op == "all_reduce"]
    assert one.args[2] == "max" and one.shapes == ((8, 1),)


def test_a_product_of_two_sums_is_not_that_of_their_terms():
    x, y = torch.randn(5), torch.randn(5)
    lowered(lambda x, y: (x * y,), Plan(tp=2), (x, TP), (y, TP))


def test_a_quotient_by_terms_waits_for_their_sum():
    x, y = torch.randn(5), torch.rand(5) + 1
    lowered(lambda x, y: (x / y,), Plan(tp=2), (x, TP), (y, TP))


# -- what is made from numbers


def test_what_is_made_from_numbers_alone_is_made_in_parts():
    x = torch.randn(64, 6)
    program = lowered(lambda x: (x * torch.full((64, 6), 2.0),), Plan(tp=2), (x, split(0, 64)))
    (made,) = [i for i in program.instructions if i.op == "aten.full.default"]
    assert made.shapes == ((32, 6),)


def test_random_rows_are_those_of_the_whole_tensor():
    x = torch.ones(7, 3)
    draw = torch.ops.moai.random
    program = lowered(
        lambda x: (x * draw((7, 3), "normal", 0.0, 1.0, 5, 0, torch.float64),), Plan(tp=3), (x, split(0, 7, parts=3))
    )
    (made,) = [i for i in program.instructions if i.op == "moai.random.default"]
    assert made.args[5].values == (0, 3, 5)


# -- what kernels are given


def layer_norm(grad, x, w, b):
    out, mean, rstd = aten.native_layer_norm(x, (8,), w, b, 1e-5)
    return out, *aten.native_layer_norm_backward(grad, x, (8,), mean, rstd, w, b, (True, True, True))


def test_statistics_of_a_norm_that_are_cut_lie_densely():
    """The kernel of the backward walks through their memory."""
    given = (torch.randn(4, 6, 8), split(1, 6)), *((t, REPLICATE) for t in (torch.randn(4, 6, 8), *torch.randn(2, 8)))
    lowered(layer_norm, Plan(tp=2), *given)


def group_norm(grad, x, w, b):
    out, mean, rstd = aten.native_group_norm(x, w, b, 4, 6, 25, 2, 1e-5)
    return out, *aten.native_group_norm_backward(grad, x, mean, rstd, w, 4, 6, 25, 2, (True, True, True))


def test_images_that_lie_anyhow_are_normed():
    def step(x, w, b):
        x = x.permute(0, 3, 1, 2)
        return group_norm(x.cos(), x, w, b)

    lowered(step, Plan(dp=2), (torch.randn(4, 5, 5, 6), None), *((torch.randn(6), None) for _ in range(2)))


def test_an_operator_without_a_rule_is_given_whole_tensors():
    x = torch.eye(6) + 0.1 * torch.randn(6, 6).tril()
    graph = single(aten.cholesky_inverse.default, (x,))
    program = lower(graph, Plan(tp=2), [split(0, 6)])
    torch.testing.assert_close(run(program, [x])[0], torch.cholesky_inverse(x))
    assert len(program.notes) == 1


def test_samples_in_blocks_go_through_micro_batches():
    """Two views of every sample, one after the other along the batch."""

    def step(w, x):
        p = w.detach().requires_grad_()
        both = torch.cat([x, x.flip(1)])
        a, b = (both @ p).chunk(2)
        loss = F.mse_loss(a, b)
        phase("backward")
        (grad,) = torch.autograd.grad(loss, [p])
        return loss.detach(), grad

    w, x = torch.randn(6, 4), torch.randn(9, 6)
    graph = trace(step, [w], [x])
    for plan in (Plan(dp=2), Plan(micro=3), Plan(dp=2, micro=2)):
        program = lower(graph, plan, [None, None])
        assert {m[0] for m in messages(program.instructions)} <= {"all_reduce"}, "no sample moves"
        for a, b in zip(run(program, [w, x]), step(w, x), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
