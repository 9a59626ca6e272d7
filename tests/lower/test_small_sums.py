"""Small sums are under way while the step goes on: counts from its beginning, reports until its end."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from moai.graph.placement import Mesh
from moai.graph.step_graph import Ref, TensorType
from moai.lower import small_sums
from moai.lower.lowering import lower
from moai.lower.program import Instruction
from moai.lower.small_sums import under_way
from moai.lower.values import Values
from moai.plan.plan import Plan
from tests.lower.step_tracing import trace

LARGE = 1 << 20


def ordered(code: Sequence[tuple[Any, ...]], states: Collection[int] = (), large: Collection[int] = ()) -> list[int]:
    """The order of the code, by results, from (operator, result, arguments). Value 0 is an input."""
    values = Values((), Mesh((("dp", 2),)))
    for id_ in range(20):
        values.new(TensorType((LARGE if id_ in large else 1,), torch.float32))
    instructions = []
    for op, out, *args in code:
        named = op if op in ("all_reduce", "repeat", "end_repeat") else f"aten.{op}.default"
        refs = tuple(map(Ref, args))
        instructions.append(Instruction(named, (*refs, ("dp",), "sum") if op == "all_reduce" else refs, {}, out))
    return [i.outs for i in under_way(instructions, states, values)]


def test_what_a_sum_needs_of_inputs_is_worked_out_first():
    code = [("mm", 1, 0), ("sign", 2, 0), ("neg", 3, 2), ("exp", 4, 1), ("all_reduce", 5, 3), ("mul", 6, 1, 5)]
    assert ordered(code, states=[4, 6], large=[1, 4, 6]) == [2, 3, 1, 4, 5, 6]


def test_what_only_reports_need_of_a_sum_is_worked_out_last():
    code = [("mm", 1, 0), ("all_reduce", 2, 1), ("neg", 3, 2), ("exp", 4, 3), ("cos", 5, 1)]
    assert ordered(code, states=[5], large=[0, 5]) == [1, 2, 5, 3, 4]


def test_what_a_state_is_made_of_does_not_wait():
    code = [("mm", 1, 0), ("all_reduce", 2, 1), ("neg", 3, 2), ("exp", 4, 3), ("cos", 5, 1)]
    assert ordered(code, states=[4, 5], large=[0, 5]) == [1, 2, 3, 4, 5]


def test_what_is_large_is_not_kept_for_longer():
    count = [("mm", 1, 0), ("sign", 2, 0), ("all_reduce", 3, 2), ("mul", 4, 1, 3)]
    report = [("mm", 1, 0), ("all_reduce", 2, 1), ("mul", 3, 2, 0), ("exp", 4, 1)]
    assert ordered(count, states=[4], large=[0]) == [1, 2, 3, 4]
    assert ordered(report, states=[4], large=[0]) == [1, 2, 3, 4]


def test_nothing_leaves_a_loop():
    code = [("mm", 1, 0), ("repeat", None), ("sign", 2, 0), ("all_reduce", 3, 2), ("neg", 4, 3), ("end_repeat", None)]
    code += [("exp", 5, 1)]
    assert ordered(code, states=[5], large=[1]) == [1, None, 2, 3, 4, None, 5]


def test_a_loss_with_ignored_labels_makes_no_device_wait_before_the_update(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(small_sums, "_SMALL", 8)  # the labels
    widths = range(8, 33)  # no layer is like another: all are lowered
    state = [torch.randn(a, b) for a, b in pairwise(widths)]

    def step(*args):
        params = [p.detach().requires_grad_() for p in args[:-2]]
        h = args[-2]
        for p in params:
            h = F.relu(h @ p)
        loss = F.cross_entropy(h, args[-1], ignore_index=-1)
        grads = torch.autograd.grad(loss, params)
        torch._foreach_add_(list(args[:-2]), list(grads), alpha=-0.1)
        return (loss.detach(),)

    graph = trace(step, state, [torch.randn(8, 8), torch.randint(32, (8,))])
    names = [i.op for i in lower(graph, Plan(dp=2), [None] * 26).instructions]
    first = names.index("all_reduce_start")  # the count
    assert "aten.mm.default" in names[first : names.index("wait")] and "aten.mm.default" not in names[:first]
    assert "all_reduce" not in names and names.count("wait") == names.count("all_reduce_start") == 2
    of_loss = len(names) - 1 - names[::-1].index("wait")
    assert names[of_loss:] == ["wait", "aten._foreach_add_.List", "aten.div_.Tensor"]
