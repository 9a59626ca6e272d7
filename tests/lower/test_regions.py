"""Regions: what can be fused stands together, and the numbers stay as they are."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

import moai.lower.finishing
from moai.graph.placement import REPLICATE, Mesh
from moai.graph.step_graph import Ref, Scalar, TensorType
from moai.lower import Program, lower
from moai.lower.program import Instruction, PerRank, Slot
from moai.lower.regions import gathered, regions
from moai.lower.values import Values
from moai.plan.plan import Plan
from tests.lower.lockstep import run
from tests.lower.step_tracing import phase, trace

SQUARE = TensorType((4, 4), torch.float32)


def op(name: str, outs: int | None, *args, frees=(), **kwargs) -> Instruction:
    args = tuple(Ref(a) if type(a) is int else a for a in args)
    return Instruction(name, args, kwargs, outs, frees, ((4, 4),) if outs is not None else ())


def order(code: Sequence[Instruction], outputs: Sequence[int] = ()) -> list[str]:
    """The names of `code`'s operators when it is gathered; every value is a replicated square."""
    values = Values((SQUARE,) * 10, Mesh(()))
    for id_ in range(10):
        values.place(id_, REPLICATE)
    return [i.op.split(".")[-2] if "." in i.op else i.op for i in gathered(code, outputs, values)]


def finished(*code: Instruction, outputs: Sequence[int]) -> Program:
    slots = (Slot(0, SQUARE, REPLICATE), Slot(1, SQUARE, REPLICATE))
    return Program("p", Mesh(()), slots, tuple(Slot(o, SQUARE, REPLICATE) for o in outputs), 1, code, 0, 0)


# -- order


def test_what_can_be_fused_waits_until_it_is_needed_and_goes_together():
    code = [
        op("aten.exp.default", 2, 0),
        op("aten.mm.default", 3, 1, 1),
        op("aten.neg.default", 4, 2),
        op("aten.mm.default", 5, 4, 1),
        op("aten.sin.default", 6, 4),  # comes behind the product, and does not need it
        op("aten.add.Tensor", 7, 5, 6),
    ]
    assert order(code, [3, 7]) == ["mm", "exp", "neg", "sin", "mm", "add"]


def test_nothing_overtakes_what_cannot_be_fused():
    code = [
        op("aten.exp.default", 2, 0),
        Instruction("all_reduce_start", ((Ref(2),), ("dp",)), {}, 3),
        Instruction("all_gather", (Ref(0), ("dp",), 0, (4,), 1), {}, 4),
        Instruction("wait", (Ref(3),), {}, (5,)),
    ]
    assert order(code, [4, 5]) == ["exp", "all_reduce_start", "all_gather", "wait"]


def test_everybody_has_views_of_their_own():
    code = [
        op("aten.exp.default", 2, 0),
        op("aten.permute.default", 3, 2, (1, 0)),
        op("aten.neg.default", 4, 3),
        op("aten.mm.default", 5, 3, 4),
        op("aten.add.Tensor", 6, 3, 5),
    ]
    assert order(code, [6]) == ["exp", "permute", "neg", "permute", "mm", "permute", "add"]


def test_a_view_is_written_in_the_section_that_makes_it():
    code = [
        op("aten.permute.default", 2, 0, (1, 0)),
        Instruction("repeat", (), {}, None),
        op("aten.mm.default", 3, 2, 2),
        Instruction("accumulate", (Ref(3), True), {}, 4),
        Instruction("end_repeat", (), {}, None),
        op("aten.mm.default", 5, 2, 4),
    ]
    assert order(code, [5]) == ["permute", "repeat", "mm", "accumulate", "end_repeat", "mm"]


def step(*args):
    """Three layers with a norm, a gate and a dropout mask, their loss and an SGD step."""
    state, x, mask = args[:-2], args[-2], args[-1]
    phase("forward")
    params = [p.detach().requires_grad_() for p in state]
    h = x
    for p in params:
        h = h + (F.silu(F.layer_norm(h, (h.shape[-1],)) @ p) * mask) @ p.t()
    loss = h.square().mean()
    phase("backward")
    grads = torch.autograd.grad(loss, params)
    phase("optimizer")
    torch._foreach_add_(list(state), list(grads), alpha=-0.1)
    return (loss.detach(),)


@pytest.mark.parametrize(
    "plan", [Plan(), Plan(dp=2), Plan(dp=2, micro=2), Plan(tp=2), Plan(dp=2, distribute_param=True)], ids=str
)
def test_the_order_changes_no_number(plan: Plan, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    state = [torch.randn(8, 8) for _ in range(3)]
    batch = [torch.randn(8, 8), (torch.rand(8, 8) > 0.5).float()]
    graph = trace(step, state, batch)
    with_regions = lower(graph, plan, [None] * 5)
    monkeypatch.setattr(moai.lower.finishing, "gathered", lambda code, outputs, values: list(code))
    without = lower(graph, plan, [None] * 5)
    assert len(regions(with_regions)) >= 6
    assert run(with_regions, [*state, *batch])[0] == run(without, [*state, *batch])[0]
    for a, b in zip(run(with_regions, [*state, *batch]), run(without, [*state, *batch]), strict=True):
        assert torch.equal(a, b)


# -- regions of a finished program


def test_a_region_takes_and_gives_whole_tensors():
    program = finished(
        op("aten.permute.default", 2, 0, (1, 0)),
        op("aten.exp.default", 3, 2, frees=(2,)),
        op("aten.add_.Tensor", None, 1, 3, frees=(3,)),
        op("aten.neg.default", 4, 1, frees=(0,)),
        op("aten.permute.default", 5, 4, (1, 0)),
        op("aten.mm.default", 6, 5, 4, frees=(4, 5)),
        outputs=[1, 6],
    )
    (region,) = regions(program)
    assert (region.start, region.stop) == (0, 4)
    assert (region.inputs, region.outputs, region.frees) == ((0, 1), (4,), (0,))


def test_an_operator_with_a_kernel_can_be_fused_though_it_could_be_composed_of_others():
    program = finished(op("aten.exp.default", 2, 0), op("aten.silu_backward.default", 3, 1, 2), outputs=[3])
    assert len(regions(program)) == 1


def test_one_operator_is_no_region():
    program = finished(op("aten.permute.default", 2, 0, (1, 0)), op("aten.exp.default", 3, 2, frees=(2,)), outputs=[3])
    assert regions(program) == ()


def test_a_run_with_a_view_that_others_need_is_no_region():
    program = finished(
        op("aten.exp.default", 2, 0),
        op("aten.permute.default", 3, 2, (1, 0)),
        op("aten.neg.default", 4, 3, frees=(2,)),
        op("aten.mm.default", 5, 3, 4, frees=(3, 4)),
        outputs=[5],
    )
    assert regions(program) == ()


@pytest.mark.parametrize(
    "other",
    [
        op("aten.mul.Scalar", 3, 2, Scalar(0)),
        Instruction("aten.full.default", ((PerRank(("micro",), (1, 2)), 4), 1.0), {}, 3, (), ((4, 4),)),
        op("moai.sdpa.default", 3, 2, 2, 2),
        op("aten.bernoulli.p", 3, 2, 0.5),
        op("aten._foreach_add_.Scalar", None, (Ref(2),), 1),
        op("aten.index_put.default", 3, 2, (Ref(1),), 2),
    ],
    ids=lambda i: i.op,
)
def test_what_changes_or_is_a_kernel_of_its_own_ends_a_region(other: Instruction):
    program = finished(op("aten.exp.default", 2, 0), other, op("aten.neg.default", 4, 2), outputs=[2, 4])
    assert regions(program) == ()
