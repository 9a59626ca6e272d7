"""Batch dims that a script has flattened for a product are taken apart again, and the numbers are the same."""

from __future__ import annotations

from collections.abc import Callable

import torch

from moai.lower.batches import with_batch_dims
from moai.lower.canonical import canonical
from moai.lower.values import Values
from moai.plan.plan import Plan
from tests.lower.nodes import interpret
from tests.lower.step_tracing import trace

SAMPLES, HEADS, LENGTH, WIDTH = 2, 3, 4, 5
Tensor = torch.Tensor


def rewritten(fn: Callable[[Tensor], tuple[Tensor, ...]]) -> list[tuple[str, tuple[int, ...]]]:
    """The operators that `fn` of [samples, heads, length, width] has become, with the shape of the first result; they
    have been seen to give the same."""
    x = torch.randn(SAMPLES, HEADS, LENGTH, WIDTH)
    graph = trace(fn, [], [x])
    nodes, types, outputs = canonical(graph)
    values = Values(types, Plan(tp=2).mesh)
    found = with_batch_dims(nodes, values, outputs)
    given = {graph.inputs[0].id: x}
    for a, b in zip(interpret(found, given, outputs)[0], fn(x), strict=True):
        torch.testing.assert_close(a, b)
    return [(n.op.name().partition(".")[0], values.types[n.outs].shape) for n in found]


def flat(x: Tensor) -> Tensor:
    return x.reshape(-1, *x.shape[2:])


def test_a_product_of_flattened_batches_has_both_batch_dims():
    ops = rewritten(lambda x: (torch.bmm(flat(x), flat(x).mT).view(SAMPLES, HEADS, LENGTH, LENGTH).tanh(),))
    assert ops == [
        ("aten::permute", (SAMPLES, HEADS, WIDTH, LENGTH)),
        ("moai::matmul", (SAMPLES, HEADS, LENGTH, LENGTH)),
        ("aten::tanh", (SAMPLES, HEADS, LENGTH, LENGTH)),
    ]


def test_what_comes_between_two_products_has_them_too():
    def attention(x: Tensor) -> tuple[Tensor, ...]:
        mask = torch.zeros(1, LENGTH, LENGTH)
        scores = torch.baddbmm(mask, flat(x) * 0.5, flat(x).mT, beta=2, alpha=3)
        return (torch.bmm(scores.softmax(-1)[:, 1:], flat(x)).view(SAMPLES, HEADS, LENGTH - 1, WIDTH),)

    shapes = [shape for op, shape in rewritten(attention) if op != "aten::full" and shape != (1, 1, LENGTH, LENGTH)]
    assert all(shape[:2] == (SAMPLES, HEADS) for shape in shapes)


def test_a_tensor_that_was_not_flattened_is_taken_apart_where_it_meets_one_that_was():
    ops = rewritten(lambda x: (torch.bmm(flat(x), torch.ones(SAMPLES * HEADS, WIDTH, 2)).view(SAMPLES, HEADS, -1),))
    assert ("moai::matmul", (SAMPLES, HEADS, LENGTH, 2)) in ops


def test_an_operator_that_cannot_do_without_gets_the_flattened_tensor():
    ops = rewritten(lambda x: (torch.bmm(torch.cumsum(flat(x), 0) + flat(x), flat(x).mT),))
    assert ("aten::cumsum", (SAMPLES * HEADS, LENGTH, WIDTH)) in ops
    assert ("moai::matmul", (SAMPLES, HEADS, LENGTH, LENGTH)) in ops


def test_an_output_stays_flattened():
    assert rewritten(lambda x: (torch.bmm(flat(x), flat(x).mT),))[-1] == (
        "aten::reshape",
        (SAMPLES * HEADS, LENGTH, LENGTH),
    )


def test_flattened_batches_of_no_product_stay_as_they_are():
    assert rewritten(lambda x: (flat(x).softmax(-1) * 2,)) == [
        ("aten::reshape", (SAMPLES * HEADS, LENGTH, WIDTH)),
        ("aten::_softmax", (SAMPLES * HEADS, LENGTH, WIDTH)),
        ("aten::mul", (SAMPLES * HEADS, LENGTH, WIDTH)),
    ]
