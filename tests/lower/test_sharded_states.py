"""Sharded states: what is gathered where, and to which part gradients are summed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moai.graph.placement import REPLICATE, Placement, Shard
from moai.graph.step_graph import Input, Node, Origin, Ref, TensorType
from moai.lower import Instruction, Program, lower
from moai.lower.dropped import with_own_views
from moai.plan.plan import Plan
from tests.lower.lockstep import run
from tests.lower.sections import loops, messages, ops, outside
from tests.lower.step_tracing import phase, trace

LAYERS = 3
WIDTH = 32  # of a layer; its weight is just large enough to be spread
SHARDED = Plan(dp=2, distribute_param=True)
LOW = Plan(dp=2, distribute_param=True, distribute_low_prec_param=True)

pytestmark = pytest.mark.usefixtures("double_precision")


def step(*args):
    """Weights, their momenta and a bias; one batch."""
    params, momenta, bias, x = args[:LAYERS], args[LAYERS : 2 * LAYERS], args[-2], args[-1]
    inner = [p.detach().requires_grad_() for p in (*params, bias)]
    h = x
    for p in inner[:-1]:
        h = (h @ p).tanh()
    loss = (h + inner[-1]).square().mean()
    phase("backward")
    grads = torch.autograd.grad(loss, inner)
    phase("optimizer")
    for p, m, g in zip(params, momenta, grads, strict=False):
        m.mul_(0.9).add_(g)
        p.add_(m, alpha=-0.1)
    bias.add_(grads[-1], alpha=-0.1)
    return (loss.detach(),)


def lowered(plan: Plan, width: int = WIDTH, given: list[Placement | None] | None = None) -> Program:
    """The program of a step; it has been seen to give one device's numbers."""
    tensors = [torch.randn(width, width) / 6 for _ in range(2 * LAYERS)]
    tensors += [torch.randn(width), torch.randn(9, width)]
    program = lower(trace(step, tensors[:-1], tensors[-1:]), plan, given or [None] * len(tensors))
    plain = [t.clone() for t in tensors]
    expected = [*step(*plain), *plain[:-1]]
    for a, b in zip(run(program, tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    return program


def dropping(**others: int) -> Plan:
    return Plan(dp=2, distribute_param=True, distribute_low_prec_param=True, **others)


def kinds(instructions: list[Instruction] | tuple[Instruction, ...]) -> list[tuple[str, tuple[str, ...]]]:
    """What devices exchange of tensors that are spread (the loss and the bias are small, and whole)."""
    return [(kind, axes) for kind, axes, _ in messages(instructions) if kind != "all_reduce"]


# -- how states lie


def test_states_are_spread_over_the_devices_that_share_the_batch():
    program = lowered(SHARDED)
    part = Placement((Shard(0, ("dp",), (16, 16)),))
    assert [s.placement for s in program.inputs[: 2 * LAYERS]] == [part] * 2 * LAYERS
    assert program.resident_bytes < 0.6 * lowered(Plan(dp=2)).resident_bytes


def test_what_takes_the_place_of_a_state_lies_as_the_state_did():
    program = lowered(SHARDED)
    lies = {k: s.placement for k, s in enumerate(program.inputs)}
    assert all(o.placement == lies[o.replaces] for o in program.outputs if o.replaces is not None)


def test_a_small_state_is_whole_everywhere():
    assert lowered(SHARDED).inputs[2 * LAYERS].placement == REPLICATE


def test_parts_need_not_be_even():
    (shard,) = lowered(Plan(dp=3, distribute_param=True)).inputs[0].placement.shards
    assert shard.sizes == (11, 11, 10)


def test_a_dim_shorter_than_the_devices_is_not_split():
    w = torch.randn(2, 512)
    graph = trace(lambda w, x: ((x @ w).sum(),), [w], [torch.randn(6, 2)])
    program = lower(graph, Plan(dp=3, distribute_param=True), [None, None])
    assert program.inputs[0].placement.shards[0].dim == 1


def test_states_that_lie_whole_already_are_spread_by_their_first_step():
    program = lowered(SHARDED, given=[REPLICATE] * (2 * LAYERS + 1) + [None])
    (part,) = {o.placement for o in program.outputs if o.replaces in range(2 * LAYERS)}
    assert [str(s.placement) for s in program.inputs[:2]] == ["R", "R"] and str(part) == "S0(dp)"


def test_numbers_of_another_kind_are_not_spread():
    table = torch.arange(2048)
    graph = trace(lambda t, x: (t[x],), [table], [torch.randint(0, 2048, (4,))])
    assert lower(graph, SHARDED, [None, None]).inputs[0].placement == REPLICATE


# -- gathering


def test_a_weight_is_gathered_once_and_serves_the_backward_too():
    program = lowered(SHARDED)
    assert kinds(program.instructions).count(("all_gather", ("dp",))) == LAYERS


def test_a_dropped_weight_is_gathered_again_in_the_backward():
    program = lowered(LOW, width=512)  # large enough not to be gathered together
    found = [id_ for kind, _, id_ in messages(program.instructions) if kind == "all_gather"]
    weights = [s.id for s in program.inputs[:LAYERS]]
    assert found[:LAYERS] == weights
    # The backward meets them in reverse, and needs no more of the first layer than its gradient.
    assert found[LAYERS:] == weights[:0:-1]


def test_the_backward_takes_its_own_view_of_a_dropped_weight():
    """A product that is computed again reads the view that the forward took."""
    aten = torch.ops.aten
    forward, backward = Origin("forward"), Origin("backward")
    nodes = [
        Node(aten._to_copy.default, (Ref(0),), {"dtype": torch.bfloat16}, 2, forward),
        Node(aten.permute.default, (Ref(2), (1, 0)), {}, 3, forward),
        Node(aten.mm.default, (Ref(1), Ref(3)), {}, 4, forward),
        Node(aten.mm.default, (Ref(1), Ref(3)), {}, 5, backward),
    ]
    inputs = [Input(0, batch=False, dies=False), Input(1, batch=True, dies=False)]
    types = [TensorType((8, 8), torch.float32)] * 6
    cast, view, product, own, again = with_own_views(nodes, types, inputs)[0]
    assert [cast, view, product] == nodes[:3]
    assert own == replace(nodes[1], outs=6, origin=backward)
    assert again.args == (Ref(1), Ref(6))


def test_momenta_are_never_gathered():
    for plan in (SHARDED, LOW):
        program = lowered(plan)
        momenta = {s.id for s in program.inputs[LAYERS : 2 * LAYERS]}
        assert momenta.isdisjoint(id_ for _, _, id_ in messages(program.instructions))


def test_a_weight_that_stays_is_gathered_outside_of_the_loop_over_micro_batches():
    program = lowered(Plan(dp=2, micro=2, distribute_param=True))
    assert "all_gather" not in {kind for kind, _ in kinds(loops(program)[0])}
    assert kinds(outside(program)).count(("all_gather", ("dp",))) == LAYERS


def test_a_dropped_weight_is_gathered_in_every_pass_forward_and_backward():
    program = lowered(Plan(dp=2, micro=2, distribute_param=True, distribute_low_prec_param=True))
    assert kinds(loops(program)[0]).count(("all_gather", ("dp",))) == 2 * LAYERS - 1
    assert ("all_gather", ("dp",)) not in kinds(outside(program))


# -- summing


def test_gradients_are_summed_to_the_part_of_the_state_that_they_update():
    program = lowered(SHARDED)
    assert kinds(program.instructions).count(("reduce_scatter", ("dp",))) == LAYERS
    whole = [id_ for kind, _, id_ in messages(program.instructions) if kind == "all_reduce"]
    assert len(whole) == 2  # the loss and the bias


def test_gradients_are_scattered_once_a_step_behind_the_loop():
    program = lowered(Plan(dp=2, micro=2, distribute_param=True))
    assert ("reduce_scatter", ("dp",)) not in kinds(loops(program)[0])
    assert kinds(outside(program)).count(("reduce_scatter", ("dp",))) == LAYERS


def test_where_weights_are_dropped_every_pass_scatters_its_gradients_and_parts_are_added_up():
    program = lowered(dropping(micro=2))
    assert kinds(loops(program)[0]).count(("reduce_scatter", ("dp",))) == LAYERS
    assert ("reduce_scatter", ("dp",)) not in kinds(outside(program))
    added = [i.args[0].id for i in loops(program)[0] if i.op == "accumulate"]
    parts = [shape for i in loops(program)[0] if i.op == "wait" for shape in zip(i.outs, i.shapes, strict=True)]
    assert [shape for id_, shape in parts if id_ in added] == [(WIDTH // 2, WIDTH)] * LAYERS


def test_the_optimizer_works_on_parts():
    program = lowered(SHARDED)
    written = [i for i in program.instructions if i.op.startswith("aten.add_")]
    assert ops(program.instructions)["add_"] == len(written) >= 2 * LAYERS
    states = {s.id for s in program.inputs[: 2 * LAYERS]}
    assert states <= {i.args[0].id for i in written}, "updated where they lie"


def test_new_states_of_a_first_step_are_made_as_parts():
    def first_step(w, x):
        p = w.detach().requires_grad_()
        loss = (x @ p).square().mean()
        phase("backward")
        grads = torch.autograd.grad(loss, [p])
        phase("optimizer")
        m = torch._foreach_mul([torch.zeros_like(w)], 0.9)
        m = torch._foreach_addcmul(m, grads, grads)
        w.sub_(m[0])
        return (m[0],)

    graph = trace(first_step, [torch.randn(WIDTH, WIDTH)], [torch.randn(4, WIDTH)])
    program = lower(graph, SHARDED, [None, None])
    made = [i for i in program.instructions if i.op == "aten.full.default" and i.args[0]]
    assert [i.shapes for i in made] == [((WIDTH // 2, WIDTH),)]


# -- groups of devices


def test_states_are_spread_within_a_group_and_the_same_in_all_groups():
    program = lowered(Plan(dp=4, shard=2, distribute_param=True))
    assert program.inputs[0].placement == Placement((Shard(0, ("dp_shard",), (16, 16)),))
    assert program.inputs[-1].placement.shards[0].axes == ("dp_replicate", "dp_shard")


def test_weights_are_gathered_within_a_group():
    program = lowered(Plan(dp=4, shard=2, distribute_param=True))
    gathers = [axes for kind, axes in kinds(program.instructions) if kind == "all_gather"]
    assert gathers == [("dp_shard",)] * LAYERS


def test_gradients_are_scattered_within_a_group_and_then_their_parts_summed_over_groups():
    program = lowered(Plan(dp=4, shard=2, distribute_param=True))
    scattered = [i for i in program.instructions if i.op.startswith("reduce_scatter")]
    assert {i.args[1] for i in scattered} == {("dp_shard",)}
    between = [id_ for kind, axes, id_ in messages(program.instructions) if axes == ("dp_replicate",)]
    assert len(between) == LAYERS, "only the parts go from group to group"


# -- with tensor parallelism


def test_a_weight_is_split_over_one_dim_and_spread_over_another():
    program = lowered(Plan(dp=2, tp=2, distribute_param=True))
    axes = [{a for s in slot.placement.shards for a in s.axes} for slot in program.inputs[:LAYERS]]
    assert {"dp", "tp"} in axes and all("dp" in a for a in axes)
    for slot in program.inputs[:LAYERS]:
        assert len({s.dim for s in slot.placement.shards}) == len(slot.placement.shards)
