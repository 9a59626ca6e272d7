"""Micro-batches: what runs in each pass of a loop, what is handed on, and what runs once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moai.graph.placement import REPLICATE, Mesh
from moai.graph.step_graph import Ref, StepGraph, TensorType
from moai.lower import Instruction, Program, lower
from moai.lower.inplace import in_place
from moai.lower.values import Values
from moai.plan.errors import PlanError
from moai.plan.plan import Plan
from tests.lower.lockstep import run
from tests.lower.sections import loops, messages, ops, outside, short
from tests.lower.step_tracing import phase, trace

Tensors = Sequence[torch.Tensor]
WEIGHTS = ((6, 16), (16, 5))

pytestmark = pytest.mark.usefixtures("double_precision")


def step_with(forward: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """A training step of the two weights with SGD; gives the loss."""

    def step(first, second, *batch):
        params = [p.detach().requires_grad_() for p in (first, second)]
        loss = forward(*params, *batch)
        phase("backward")
        grads = torch.autograd.grad(loss, params)
        phase("optimizer")
        for p, g in zip((first, second), grads, strict=True):
            p.add_(g, alpha=-0.1)
        return (loss.detach(),)

    return step


def squared(first, second, x):
    return ((x @ first).relu() @ second).square().mean()


def classified(first, second, x, y):
    return F.cross_entropy((x @ first).relu() @ second, y)


def weights() -> list[torch.Tensor]:
    return [torch.randn(shape) for shape in WEIGHTS]


def labels(n: int) -> torch.Tensor:
    """Class numbers, of which the first half are almost all ignored."""
    found = torch.arange(n) % 5
    found[1 : n // 2] = -100
    return found


def lowered(forward: Callable[..., torch.Tensor], plan: Plan, *batch: torch.Tensor) -> Program:
    """The program of a step; it has been seen to give one device's numbers."""
    step, state = step_with(forward), weights()
    graph = trace(step, state, batch)
    program = lower(graph, plan, [None] * len(graph.inputs))
    plain = [t.clone() for t in (*state, *batch)]
    expected = [*step(*plain), *plain[:2]]
    for a, b in zip(run(program, [*state, *batch]), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    return program


# -- what is summed


@pytest.mark.parametrize("dp", [1, 2])
def test_every_gradient_is_added_up_in_the_loop_and_summed_over_devices_once_behind_it(dp: int):
    program = lowered(squared, Plan(dp=dp, micro=3), torch.randn(13, 6))
    (loop,) = loops(program)
    assert ops(loop)["accumulate"] == 3  # two gradients and the loss
    assert messages(loop) == []
    made = {i.outs for i in loop if i.op == "accumulate"}
    assert {id_ for _, _, id_ in messages(outside(program))} == (made if dp > 1 else set())


def test_the_loop_runs_once_for_every_micro_batch():
    program = lowered(squared, Plan(micro=4), torch.randn(10, 6))
    cut = next(i for i in loops(program)[0] if i.op == "aten.slice.Tensor")
    assert cut.args[2].values == (0, 3, 6, 8) and cut.args[3].values == (3, 6, 8, 10)


def test_a_mean_is_divided_by_the_count_of_the_whole_batch():
    program = lowered(squared, Plan(dp=2, micro=2), torch.randn(9, 6))
    divisors = [i.args[1] for i in program.instructions if i.op.startswith("aten.div")]
    assert divisors and set(divisors) == {9 * 5}


def test_labels_are_counted_in_a_loop_of_their_own():
    program = lowered(classified, Plan(dp=2, micro=3), torch.randn(14, 6), labels(14))
    counting, training = loops(program)
    assert set(ops(counting)) == {"slice", "class_weight", "accumulate"}
    assert "class_weight" not in ops(training) and ops(training)["mm"] == 5


def test_a_total_that_waits_for_all_samples_is_summed_between_the_loops():
    program = lowered(classified, Plan(dp=2, micro=2), torch.randn(8, 6), labels(8))
    names = [i.op for i in program.instructions]
    assert names.index("end_repeat") < names.index("all_reduce") < names.index("repeat", names.index("end_repeat"))


def test_the_memory_of_a_first_term_becomes_that_of_the_sum():
    program = lowered(squared, Plan(micro=2), torch.randn(8, 6))
    assert all(i.args[1] is True for i in loops(program)[0] if i.op == "accumulate")


def test_a_term_that_somebody_else_reads_is_copied_into_the_sum():
    def step(w, x):
        phase("backward")
        terms = x.T @ (x @ w)
        return terms, terms[0]  # two sums, whose first terms share memory

    w, x = torch.randn(6, 6), torch.randn(8, 6)
    program = lower(trace(step, [w], [x]), Plan(micro=2), [None, None])
    assert [i.args[1] for i in loops(program)[0] if i.op == "accumulate"] == [False, False]
    for a, b in zip(run(program, [w, x]), step(w, x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


# -- what is in no loop


def test_nothing_of_the_optimizer_is_in_a_loop():
    program = lowered(squared, Plan(dp=2, micro=2), torch.randn(8, 6))
    assert "add_" not in ops(loops(program)[0])
    assert ops(outside(program))["add_"] == 2


def test_what_does_not_depend_on_the_samples_is_computed_once():
    def forward(first, second, x):
        return ((x @ first.exp()).relu() @ second).square().mean()

    program = lowered(forward, Plan(micro=2), torch.randn(8, 6))
    assert ops(outside(program))["exp"] == 1 and "exp" not in ops(loops(program)[0])


def test_a_step_without_a_backward_needs_no_loop():
    graph = trace(lambda w, x: (x @ w,), [torch.randn(6, 4)], [torch.randn(8, 6)])
    program = lower(graph, Plan(dp=2, micro=4), [None, None])
    assert program.mesh.steps == 1 and loops(program) == []


# -- what is handed on


def of_all_samples(first, second, x):
    """Every sample needs a sum over all of them."""
    h = (x @ first).exp()
    return ((h / h.sum(0)) @ second).square().sum()


def test_values_that_a_later_loop_reads_are_handed_on():
    program = lowered(of_all_samples, Plan(dp=2, micro=3), torch.randn(13, 6))
    first, *later = loops(program)
    assert ops(first)["mm"] == 1 and ops(first)["collect"] >= 1
    lists = {i.outs for i in first if i.op == "collect"}
    taken = [i.args[0].id for loop in later for i in loop if i.op == "take"]
    assert lists <= set(taken) and len(taken) == len(set(taken)), "a list is given away entry by entry, once"


def test_a_view_is_made_again_rather_than_handed_on():
    def forward(first, second, x):
        rows = x.view(-1, 2, 3).transpose(1, 2).flatten(1)
        h = rows @ first
        return ((h - h.sum(0)).cos() @ second + rows[:, :5]).square().sum()

    program = lowered(forward, Plan(micro=2), torch.randn(8, 6))
    handed_on = {i.args[0].id for loop in loops(program) for i in loop if i.op == "collect"}
    views = {i.outs for loop in loops(program) for i in loop if i.op in ("aten.permute.default", "aten.slice.Tensor")}
    assert not handed_on & views


def test_results_of_every_sample_are_joined_behind_the_loop():
    def step(first, second, x):
        p = first.detach().requires_grad_()
        h = x @ p
        phase("backward")
        (grad,) = torch.autograd.grad(h.square().sum(), [p])
        return h.detach(), grad

    state, x = weights(), torch.randn(7, 6)
    program = lower(trace(step, state, [x]), Plan(dp=2, micro=3), [None] * 3)
    (joined,) = [i for i in outside(program) if i.op == "join"]
    assert joined.outs in {o.id for o in program.outputs}
    assert program.outputs[0].placement.shards[0].axes == ("dp",)
    torch.testing.assert_close(run(program, [*state, x])[0], x @ state[0], rtol=1e-12, atol=1e-12)


def written_over(*code: tuple[str, tuple[Any, ...], int | None]) -> list[str]:
    """The operators of (op, args, out) after `in_place`; value 0 is an input, all are alike."""
    values = Values((), Mesh((("micro", 2),)))
    for _ in range(9):
        values.new(TensorType((4,), torch.float32), REPLICATE)
    instructions = [Instruction(op, args, {}, out) for op, args, out in code]
    found, _ = in_place(instructions, [0], [], values)
    return [short(i) for i in found if "." in i.op]


NEG, ADD = "aten.neg.default", "aten.add.Tensor"
REPEAT, END = ("repeat", (), None), ("end_repeat", (), None)


def test_what_a_pass_has_made_is_overwritten_in_it():
    assert written_over(REPEAT, (NEG, (Ref(0),), 1), (ADD, (Ref(1), 1), 2), END) == ["neg", "add_"]


def test_what_was_made_before_a_loop_is_not_overwritten_in_it():
    """The next pass reads it again."""
    assert written_over((NEG, (Ref(0),), 1), REPEAT, (ADD, (Ref(1), 1), 2), END) == ["neg", "add"]


def test_what_was_made_before_a_loop_is_overwritten_behind_it():
    code = (NEG, (Ref(0),), 1), REPEAT, (ADD, (Ref(1), 1), 2), END, (ADD, (Ref(1), 1), 3)
    assert written_over(*code) == ["neg", "add", "add_"]


def test_what_a_list_holds_is_not_overwritten_neither_before_nor_after_it_is_taken():
    first = REPEAT, (NEG, (Ref(0),), 1), ("collect", (Ref(1),), 2), (ADD, (Ref(1), 1), 3), END
    second = REPEAT, ("take", (Ref(2),), 4), (ADD, (Ref(4), 1), 5), END
    assert written_over(*first, *second) == ["neg", "add", "add"]


def test_nor_is_what_shares_memory_with_an_entry_of_a_list():
    view = ("aten.view.default", (Ref(1), (4,)), 6)
    assert written_over(REPEAT, (NEG, (Ref(0),), 1), view, ("collect", (Ref(6),), 2), (ADD, (Ref(1), 1), 3), END) == [
        "neg",
        "view",
        "add",
    ]


# -- memory and sizes


def test_passes_hold_the_activations_of_one_micro_batch():
    def peak(micro: int) -> int:
        graph = trace(step_with(squared), weights(), [torch.randn(512, 6)])
        program = lower(graph, Plan(micro=micro), [None] * 3)
        return program.peak_bytes - program.resident_bytes

    assert peak(8) < 0.2 * peak(1)


def graph_of(samples: int) -> StepGraph:
    return trace(step_with(squared), weights(), [torch.randn(samples, 6)])


def test_a_first_batch_with_fewer_samples_than_parts_is_refused_with_the_nearest_plan():
    with pytest.raises(PlanError, match=r"batch of 5 .* dp=2 x micro=4") as refused:
        lower(graph_of(5), Plan(dp=2, micro=4), [None] * 3)
    assert "micro=2" in str(refused.value)


def test_a_later_batch_with_fewer_samples_runs_in_fewer_parts():
    program = lower(graph_of(12), Plan(dp=2, micro=4), [None] * 3)
    lies = [s.placement for s in program.inputs[:2]]
    last = lower(graph_of(5), Plan(dp=2, micro=4), [*lies, None])
    assert last.mesh.steps == 2


@pytest.mark.parametrize("samples", [8, 9, 10, 11])
def test_parts_differ_by_a_sample_at_most(samples: int):
    program = lowered(squared, Plan(dp=2, micro=4), torch.randn(samples, 6))
    cut = next(i for i in loops(program)[0] if i.op == "aten.slice.Tensor")
    lengths = [b - a for a, b in zip(cut.args[2].values, cut.args[3].values, strict=True)]
    assert sum(lengths) == samples and set(lengths) <= {1, 2}
