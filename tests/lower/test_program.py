"""What a lowered program looks like: collectives, memory, in-place updates, notes."""

from __future__ import annotations

import time
from collections import Counter

import pytest
import torch
import torch.nn.functional as F

from moai.graph.placement import REPLICATE, Placement, Shard
from moai.graph.step_graph import Input, Node, Origin, Output, Ref, StepGraph, TensorType
from moai.lower import Program, lower
from moai.plan.plan import Plan
from tests.lower.lockstep import run, run_local, spread, whole
from tests.lower.step_tracing import single, trace

aten = torch.ops.aten
FORWARD = Origin("forward", where="train.py:7")
TERMS = Placement(partial=("dp",))


def shard(dim: int, *sizes: int) -> Placement:
    """`dim` split over "dp"."""
    return Placement((Shard(dim, ("dp",), sizes),))


def ops(program: Program) -> Counter[str]:
    return Counter(i.op for i in program.instructions)


def reduced(program: Program) -> list[list[int]]:
    """The ids of the terms of each reduction, in program order."""
    found = []
    for i in program.instructions:
        if i.op == "all_reduce":
            found.append([i.args[0].id])
        elif i.op == "all_reduce_start":
            found.append([r.id for r in i.args[0]])
    return found


def graph(types, nodes, outputs, batch=(), dies=(), n_inputs=None) -> StepGraph:
    """A graph from (op, args, out) triples; tensors are given by shape, as float32."""
    types = tuple(t if isinstance(t, TensorType) else TensorType(t, torch.float32) for t in types)
    made = {o for _, _, o in nodes}
    inputs = [i for i in range(len(types)) if i not in made]
    return StepGraph(
        types,
        tuple(Input(i, i in batch, i in dies) for i in inputs),
        tuple(o if isinstance(o, Output) else Output(o) for o in outputs),
        tuple(Node(op, args, {}, out, FORWARD) for op, args, out in nodes),
        0,
    )


def step_of_a_deep_mlp(layers: int, width: int):
    """A traced training step with foreach SGD, and its state and batch."""
    state = [torch.randn(width, width) for _ in range(layers)]

    def step(*args):
        params = [p.detach().requires_grad_() for p in args[:-1]]
        h = args[-1]
        for p in params:
            h = F.relu(h @ p)
        loss = h.square().mean()
        grads = torch.autograd.grad(loss, params)
        torch._foreach_add_(list(args[:-1]), list(grads), alpha=-0.1)
        return (loss.detach(),)

    return trace(step, state, [torch.randn(8, width)]), state


# -- collectives


def test_each_gradient_is_reduced_once_and_with_others():
    traced, state = step_of_a_deep_mlp(6, 16)
    program = lower(traced, Plan(dp=2), [None] * 7)
    terms = [t for group in reduced(program) for t in group]
    assert len(terms) == len(set(terms)) == len(state) + 1  # the gradients and the loss
    assert len(reduced(program)) == 1
    assert ops(program)["all_gather"] == 0


def test_large_gradients_go_in_buckets_as_they_become_ready():
    traced, _state = step_of_a_deep_mlp(8, 1024)  # 4 MB each
    program = lower(traced, Plan(dp=2), [None] * 9)
    assert len(reduced(program)) == 4  # two layers in each; the loss goes with one of them
    names = [i.op for i in program.instructions]
    first_start = names.index("all_reduce_start")
    assert "aten.mm.default" in names[first_start:], "the first bucket starts while the backward goes on"
    assert names.index("wait") > max(k for k, n in enumerate(names) if n == "aten.mm.default")


def test_one_device_needs_no_collective():
    traced, _ = step_of_a_deep_mlp(2, 16)
    program = lower(traced, Plan(dp=1), [None] * 3)
    assert not any("." not in i.op for i in program.instructions)


def test_a_partial_waits_behind_linear_operators_and_is_reduced_where_it_is_smallest():
    g = graph(
        [(8, 4), (4,), (4,), ()],
        [
            (aten.sum.dim_IntList, (Ref(0), (0,)), 1),
            (aten.neg.default, (Ref(1),), 2),
            (aten.sum.default, (Ref(2),), 3),
        ],
        [3],
        batch=[0],
    )
    program = lower(g, Plan(dp=2), [None])
    assert [program.instructions[-1].op] == ["all_reduce"] and ops(program)["all_reduce"] == 1
    assert program.instructions[-1].shapes == ((),)


def test_a_sum_that_several_operators_need_is_taken_once():
    g = graph(
        [(8, 4), (4,), (4,), (4,)],
        [
            (aten.sum.dim_IntList, (Ref(0), (0,)), 1),
            (aten.exp.default, (Ref(1),), 2),
            (aten.cos.default, (Ref(1),), 3),
        ],
        [2, 3],
        batch=[0],
    )
    assert len(reduced(lower(g, Plan(dp=2), [None]))) == 1


def test_a_partial_is_not_rounded_before_it_is_summed():
    def step(x):
        return (x.sum(0).to(torch.bfloat16),)

    g = trace(step, [], [torch.randn(8, 4)])
    names = [i.op for i in lower(g, Plan(dp=2), [None]).instructions]
    assert names == ["aten.sum.dim_IntList", "all_reduce", "aten._to_copy.default"]


def test_a_number_is_added_to_a_partial_once():
    g = graph([(8,), (), ()], [(aten.sum.default, (Ref(0),), 1), (aten.add.Tensor, (Ref(1), 1.0), 2)], [2], batch=[0])
    x = torch.arange(8.0)
    (found,) = run(lower(g, Plan(dp=4), [None]), [x])
    assert found.item() == x.sum().item() + 1


# -- inputs


def test_batch_inputs_are_split_and_state_is_whole():
    g = graph(
        [(7, 4), (1, 4), (4, 4), (), (7,), (7, 4)],
        [(aten.mm.default, (Ref(0), Ref(2)), 5)],
        [5],
        batch=[0, 1, 3, 4],
    )
    program = lower(g, Plan(dp=3), [None] * 5)
    split = shard(0, 3, 2, 2)
    assert [s.placement for s in program.inputs] == [split, REPLICATE, REPLICATE, REPLICATE, split]


def test_an_input_that_lies_otherwise_is_redistributed_by_the_program():
    g = graph([(8, 4), (4, 4), (8, 4)], [(aten.mm.default, (Ref(0), Ref(1)), 2)], [2], batch=[0])
    x, w = torch.randn(8, 4), torch.randn(4, 4)
    for given in (REPLICATE, shard(0, 4, 4), shard(1, 2, 2), TERMS):
        for weight in (REPLICATE, shard(1, 3, 1), shard(0, 1, 3), TERMS):
            program = lower(g, Plan(dp=2), [given, weight])
            assert [s.placement for s in program.inputs] == [given, weight]
            torch.testing.assert_close(run(program, [x, w])[0], x @ w)


def test_a_count_of_placements_that_does_not_fit_is_refused():
    g = graph([(8,), (8,)], [(aten.neg.default, (Ref(0),), 1)], [1])
    with pytest.raises(ValueError, match="1 inputs, but 2 placements"):
        lower(g, Plan(dp=2), [None, None])


def test_samples_stay_split_from_one_segment_to_the_next():
    g = graph([(7, 4), (7, 4)], [(aten.exp.default, (Ref(0),), 1)], [1], batch=[0])
    (slot,) = lower(g, Plan(dp=2), [None]).outputs
    assert slot.placement == shard(0, 4, 3)
    # What is split already tells the number of samples; empty and odd uploads do not change it.
    types = [(7, 4), (7,), (0,), (0,), (3, 4), (7, 4)]
    g = graph(types, [(aten.mul.Tensor, (Ref(0), Ref(0)), 5)], [5], batch=[1, 2, 3, 4])
    program = lower(g, Plan(dp=2), [slot.placement, None, None, None, None])
    assert [s.placement for s in program.inputs][1:] == [shard(0, 4, 3), *[REPLICATE] * 3]
    without = lower(g, Plan(dp=2), [REPLICATE, None, None, None, None])
    assert without.inputs[1].placement == shard(0, 4, 3)


# -- gradients that wait for a later segment


def test_gradients_of_accumulated_segments_are_reduced_once_at_the_end():
    shape = (128, 3)

    def first(w, x):
        p = w.detach().requires_grad_()
        return (torch.autograd.grad((x @ p).square().sum() / 16, [p])[0],)

    def last(w, grad, x):
        p = w.detach().requires_grad_()
        (more,) = torch.autograd.grad((x @ p).square().sum() / 16, [p])
        grad.add_(more)
        w.add_(grad, alpha=-0.1)
        return ()

    w, x1, x2 = torch.randn(shape).double(), torch.randn(7, 128).double(), torch.randn(7, 128).double()
    one = lower(trace(first, [w], [x1]), Plan(dp=3), [None, None])
    (slot,) = one.outputs
    assert slot.placement == TERMS and not reduced(one)

    second = lower(trace(last, [w, torch.zeros(shape).double()], [x2]), Plan(dp=3), [REPLICATE, slot.placement, None])
    assert len(reduced(second)) == 1
    (terms,) = run_local(one, [spread(t, s.placement, one.mesh) for t, s in zip([w, x1], one.inputs, strict=True)])
    inputs = [spread(w, REPLICATE, second.mesh), terms, spread(x2, second.inputs[2].placement, second.mesh)]
    parts = run_local(second, inputs)
    found = [whole(p, s.placement, second.mesh) for p, s in zip(parts, second.outputs, strict=True)]

    expected, grad = w.clone(), first(w, x1)[0]
    last(expected, grad, x2)
    torch.testing.assert_close(found[second_index(second, 0)], expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found[second_index(second, 1)], grad, rtol=1e-10, atol=1e-10)


def second_index(program: Program, replaced: int) -> int:
    """Which output takes over input `replaced`."""
    return [o.replaces for o in program.outputs].index(replaced)


# -- parts of length 1


def test_a_squeeze_takes_away_what_is_of_length_1_everywhere_and_not_in_a_part():
    g = graph(
        [(3, 1, 4), (3, 4), (3, 1, 4)],
        [(aten.squeeze.default, (Ref(0),), 1), (aten.squeeze.dim, (Ref(0), -3), 2)],
        [1, 2],
        batch=[0],
    )
    x = torch.randn(3, 1, 4)
    without, unchanged = run(lower(g, Plan(dp=3), [None]), [x])
    torch.testing.assert_close(without, x[:, 0])
    torch.testing.assert_close(unchanged, x)


# -- memory


def test_parameters_and_states_are_updated_in_place():
    traced, _state = step_of_a_deep_mlp(3, 16)
    for n in (1, 2):
        program = lower(traced, Plan(dp=n), [None] * 4)
        for out in program.outputs:
            if out.replaces is not None:
                assert out.id == program.inputs[out.replaces].id
        assert "aten._foreach_add_.List" in ops(program)


def test_a_fused_optimizer_is_updated_in_place_even_if_gradients_are_kept():
    state = [torch.randn(4, 4), torch.zeros(4, 4), torch.zeros(4, 4), torch.zeros(())]

    def step(p, m, v, t, x):
        inner = p.detach().requires_grad_()
        grads = torch.autograd.grad((x @ inner).square().mean(), [inner])
        torch._foreach_add_([t], 1)
        torch._fused_adamw_(
            [p], grads, [m], [v], [], [t],
            lr=0.1, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
        )  # fmt: skip
        return tuple(grads)

    program = lower(trace(step, state, [torch.randn(8, 4)]), Plan(dp=2), [None] * 5)
    assert ops(program)["aten._fused_adamw_.default"] == 1
    assert ops(program)["aten.clone.default"] == 0
    assert [o.id for o in program.outputs[1:]] == [s.id for s in program.inputs[:4]]


def test_nothing_is_overwritten_that_is_still_needed():
    # %1 = %0 + 1 may not take the place of %0, of which a view is read later.
    g = graph(
        [(4, 4), (16,), (4, 4), (16,)],
        [
            (aten.view.default, (Ref(0), (16,)), 1),
            (aten.add.Tensor, (Ref(0), 1.0), 2),
            (aten.neg.default, (Ref(1),), 3),
        ],
        [2, 3],
        dies=[0],
    )
    x = torch.randn(4, 4)
    plus, minus = run(lower(g, Plan(dp=1), [None]), [x])
    torch.testing.assert_close(plus, x + 1)
    torch.testing.assert_close(minus, -x.flatten())


def test_an_expanded_tensor_is_never_written_to():
    g = graph(
        [(1, 4), (3, 4), (3, 4)],
        [(aten.expand.default, (Ref(0), (3, 4)), 1), (aten.add.Tensor, (Ref(1), 1.0), 2)],
        [2],
        dies=[0],
    )
    assert [i.op for i in lower(g, Plan(dp=1), [None]).instructions][-1] == "aten.add.Tensor"


def test_an_argument_that_is_read_twice_is_not_written_to():
    g = graph([(4,), (4,), (4,)], [(aten.neg.default, (Ref(0),), 1), (aten.mul.Tensor, (Ref(1), Ref(1)), 2)], [2])
    assert [i.op for i in lower(g, Plan(dp=1), [None]).instructions] == ["aten.neg.default", "aten.mul.Tensor"]


def test_borrowed_inputs_stay_as_they_are():
    g = graph([(4,), (4,)], [(aten.add.Tensor, (Ref(0), 1.0), 1)], [1])
    assert [i.op for i in lower(g, Plan(dp=1), [None]).instructions] == ["aten.add.Tensor"]
    donated = graph([(4,), (4,)], [(aten.add.Tensor, (Ref(0), 1.0), 1)], [1], dies=[0])
    assert [i.op for i in lower(donated, Plan(dp=1), [None]).instructions] == ["aten.add_.Tensor"]


def test_outputs_never_share_memory():
    # A copy is the same value; yet what the next step does to one output must not change the other.
    g = graph(
        [(4, 4), (4, 4), (4, 4), (16,)],
        [
            (aten.neg.default, (Ref(0),), 1),
            (aten.clone.default, (Ref(1),), 2),
            (aten.view.default, (Ref(1), (16,)), 3),
        ],
        [1, 2, 3, 0],
    )
    x = torch.randn(4, 4)
    program = lower(g, Plan(dp=1), [None])
    outputs = [p[0] for p in run_local(program, [[x]])]
    assert len({o.untyped_storage().data_ptr() for o in (*outputs, x)}) == 5


def test_an_output_does_not_keep_a_larger_buffer_alive():
    g = graph([(64, 4), (64, 4), (4,)], [(aten.neg.default, (Ref(0),), 1), (aten.select.int, (Ref(1), 0, 3), 2)], [2])
    (out,) = run_local(lower(g, Plan(dp=1), [None]), [[torch.randn(64, 4)]])
    assert out[0].untyped_storage().nbytes() == 4 * 4


def test_peak_counts_what_is_alive_at_once():
    kb = (256,)  # 1 KiB
    chain = [(aten.exp.default, (Ref(0),), 1), (aten.mm.default, (Ref(1), Ref(1)), 2)]
    g = graph([(16, 16), (16, 16), (16, 16)], chain, [2])
    program = lower(g, Plan(dp=1), [None])
    assert program.resident_bytes == 1024 and program.peak_bytes == 3 * 1024
    views = graph(
        [kb, (16, 16), (16, 16)], [(aten.view.default, (Ref(0), (16, 16)), 1), (aten.neg.default, (Ref(1),), 2)], [2]
    )
    assert lower(views, Plan(dp=1), [None]).peak_bytes == 2 * 1024


def test_peak_is_that_of_the_device_with_most_samples():
    g = graph([(7, 256), (7, 256)], [(aten.exp.default, (Ref(0),), 1)], [1], batch=[0])
    assert lower(g, Plan(dp=2), [None]).peak_bytes == 2 * 4 * 1024


# -- what has no rule, and what cannot be


def test_an_operator_without_a_rule_is_computed_whole_and_said_so_once():
    x = torch.randn(8, 4)
    nodes = [(aten.cholesky_inverse.default, (Ref(0),), 1), (aten.cholesky_inverse.default, (Ref(1),), 2)]
    square = (8, 8)
    g = graph([square, square, square], nodes, [2], batch=[0])
    program = lower(g, Plan(dp=2), [None])
    assert len(program.notes) == 1
    assert "aten.cholesky_inverse.default" in program.notes[0] and "train.py:7" in program.notes[0]
    x = torch.eye(8) + 0.1 * torch.randn(8, 8).tril()
    torch.testing.assert_close(run(program, [x])[0], torch.cholesky_inverse(torch.cholesky_inverse(x)))


def test_random_numbers_of_a_device_of_its_own_are_refused():
    g = single(aten.bernoulli.p, (torch.rand(8, 4), 0.5), batch=[0], where="train.py:9")
    with pytest.raises(RuntimeError, match=r"bernoulli.*train.py:9.*own generator"):
        lower(g, Plan(dp=2), [None])


# -- scale


def test_512_devices_are_lowered_in_seconds():
    def step(*args):
        params = [p.detach().requires_grad_() for p in args[:-1]]
        h = args[-1]
        for p in params:
            h = F.relu(h @ p)
        return tuple(torch.autograd.grad(h.square().mean(), params))

    traced = trace(step, [torch.randn(8, 8) for _ in range(30)], [torch.randn(1000, 3, 8)])
    begin = time.process_time()
    program = lower(traced, Plan(dp=512), [None] * 31)
    assert time.process_time() - begin < 2
    assert program.inputs[-1].placement == shard(0, *[2] * 488, *[1] * 24)


def test_512_devices_give_one_device_numbers():
    g = graph(
        [(1000, 4, 8), (4000, 8), (8, 8), (4000, 8), (1000, 32), (1000,)],
        [
            (aten.view.default, (Ref(0), (4000, 8)), 1),
            (aten.mm.default, (Ref(1), Ref(2)), 3),
            (aten.view.default, (Ref(3), (1000, 32)), 4),
            (aten.sum.dim_IntList, (Ref(4), (1,)), 5),
        ],
        [5],
        batch=[0],
    )
    program = lower(g, Plan(dp=512), [None, None])
    x, w = torch.randn(1000, 4, 8), torch.randn(8, 8)
    torch.testing.assert_close(run(program, [x, w])[0], (x @ w).flatten(1).sum(1), rtol=1e-4, atol=1e-4)
