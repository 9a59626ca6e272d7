"""What bf16 and fp64 do to single operators and short chains of them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from moai.graph.step_graph import Node, Ref, StepGraph, TensorType
from tests.capture.compare import randn
from tests.capture.inline import evaluate
from tests.lower.precise import BF16, FP32, FP64, casts_of, computed, dtypes, nodes_of, rewritten
from tests.lower.step_tracing import single, trace

aten = torch.ops.aten
moai = torch.ops.moai
X, W = randn(8, 16), randn(16, 16, seed=1)


def product_of(graph: StepGraph) -> Node:
    (node,) = nodes_of(graph, aten.mm.default, aten.bmm.default, aten.addmm.default, moai.sdpa.default)
    return node


@pytest.mark.parametrize(
    "op, args",
    [
        (aten.mm.default, (X, W)),
        (aten.bmm.default, (X[None], W[None])),
        (aten.mv.default, (X, W[0])),
        (aten.addmm.default, (W[0], X, W)),
        (aten.baddbmm.default, (X[None], X[None], W[None])),
        (aten.convolution.default, (randn(2, 4, 8), randn(6, 4, 3), randn(6), [1], [1], [1], False, [0], 1)),
        (moai.sdpa.default, (*randn(3, 2, 4, 8, 16), None, True, None, False)),
    ],
    ids=lambda v: str(v) if isinstance(v, torch._ops.OpOverload) else "",
)
def test_products_take_bf16_and_are_as_exact_as_it(op: torch._ops.OpOverload, args: tuple) -> None:
    graph = rewritten(single(op, args), "bf16")
    (node,) = nodes_of(graph, op)
    assert set(dtypes(graph, node)[0]) == {BF16}
    found = evaluate(graph, [a for a in args if isinstance(a, torch.Tensor)], [])[0]
    assert found.dtype == FP32
    torch.testing.assert_close(found, tuple_first(op(*args)), rtol=0.05, atol=0.15)


def tuple_first(result: torch.Tensor | tuple[torch.Tensor, ...]) -> torch.Tensor:
    return result[0] if isinstance(result, tuple) else result


def test_fp32_and_none_change_nothing() -> None:
    graph = trace(lambda w, x: ((x @ w).exp(),), [W], [X])
    assert rewritten(graph, "fp32") == rewritten(graph, None)
    assert [n.op for n in rewritten(graph, None).nodes] == [aten.mm.default, aten.exp.default]


def test_a_parameter_is_cast_before_it_is_transposed_or_sliced_and_once_for_all_its_views() -> None:
    graph, _ = computed(lambda w, x: (x @ w.t()[:, :8], x @ w.t()[:, 8:], x @ w), [W], [X])
    (cast,) = casts_of(graph, graph.inputs[0].id)
    assert graph.types[cast.outs] == TensorType((16, 16), BF16)
    assert all(BF16 in dtypes(graph, n)[0] for n in nodes_of(graph, aten.permute.default, aten.slice.Tensor))


def test_of_an_activation_only_the_part_that_a_product_reads_is_cast() -> None:
    graph, _ = computed(lambda w, x: (x.exp()[:2] @ w,), [W], [X])
    (part,) = nodes_of(graph, aten.slice.Tensor)
    (cast,) = casts_of(graph, part.outs)
    assert graph.types[cast.outs] == TensorType((2, 16), BF16)


def test_pointwise_operators_and_views_follow_bf16() -> None:
    graph, _ = computed(lambda w, x: (torch.tanh(torch.relu(x @ w).reshape(4, 32) * 2.0) @ w.reshape(32, 8),), [W], [X])
    for node in nodes_of(graph, aten.relu.default, aten.mul.Tensor, aten.tanh.default, aten.reshape.default):
        assert dtypes(graph, node)[1] == [BF16]


def test_bf16_and_fp32_meet_in_fp32() -> None:
    graph, _ = computed(lambda w, x: (((x @ w) + x) * 2.0, torch.cat([x, x @ w])), [W], [X])
    for node in nodes_of(graph, aten.add.Tensor, aten.mul.Tensor, aten.cat.default):
        operands, results = dtypes(graph, node)
        assert {*operands, *results} == {FP32}


def test_a_constant_that_bf16_holds_does_not_widen_what_it_meets() -> None:
    def fn(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        y = x @ w
        return (torch.where(x > 0, y, torch.zeros(())) @ w,)

    graph, _ = computed(fn, [W], [X])
    (node,) = nodes_of(graph, aten.where.self)
    assert dtypes(graph, node)[1] == [BF16]


@pytest.mark.parametrize(
    "fn",
    [
        lambda y: y.exp(),
        lambda y: y.pow(3),
        lambda y: torch.rsqrt(y.abs()),
        lambda y: torch.softmax(y, -1),
        lambda y: torch.log_softmax(y, -1),
        lambda y: y.cumsum(0),
        lambda y: torch.logsumexp(y, 0),
        lambda y: torch.linalg.vector_norm(y),
        lambda y: y.var(0),
        lambda y: torch.nn.functional.layer_norm(y, (16,)),
        lambda y: torch.nn.functional.mse_loss(y, torch.ones(8, 16)),
        lambda y: torch.nn.functional.softplus(y),
        lambda y: y.sum(0),
        lambda y: y.mean(),
        lambda y: torch.zeros(4, 16).index_add(0, torch.arange(8) % 4, y),
    ],
)
def test_what_is_steep_or_adds_up_is_fp32_of_the_rounded_product(fn) -> None:
    _, (found,) = computed(lambda w, x: (fn(x @ w),), [W], [X])
    rounded = (X.bfloat16() @ W.bfloat16()).float()
    torch.testing.assert_close(found, fn(rounded), rtol=1e-5, atol=1e-5)


def test_sums_read_bf16_without_a_copy_in_fp32() -> None:
    graph, _ = computed(lambda w, x: (torch.relu(x @ w).sum(0),), [W], [X])
    (node,) = nodes_of(graph, aten.sum.dim_IntList)
    assert dtypes(graph, node) == ([BF16], [FP32])


def test_the_log_sum_exp_of_attention_stays_fp32() -> None:
    def fn(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        q = (x @ w).reshape(1, 2, 8, 8)
        out, lse = moai.sdpa(q, q, q, None, True, None, False)
        return moai.sdpa_backward(torch.ones_like(q), q, q, q, out, lse, None, True, None, False)

    graph, _ = computed(fn, [W], [X])
    (forward,), (backward,) = nodes_of(graph, moai.sdpa.default), nodes_of(graph, moai.sdpa_backward.default)
    assert dtypes(graph, forward)[1] == [BF16, FP32]
    assert dtypes(graph, backward) == ([BF16] * 5 + [FP32], [BF16] * 3)


def test_a_fully_masked_row_attends_as_in_fp32() -> None:
    """The least number of fp32 would be -inf in bf16, and the softmax of a row of it no number."""
    q = randn(1, 1, 4, 16)
    mask = torch.zeros(1, 1, 4, 4)
    mask[..., 1:] = torch.finfo(FP32).min
    mask[..., 0, :] = torch.finfo(FP32).min
    graph = rewritten(single(moai.sdpa.default, (q, q, q, mask, False, None, False)), "bf16")
    found = evaluate(graph, [q, q, q, mask], [])[0]
    expected = moai.sdpa(q, q, q, mask, False, None, False)[0]
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_an_infinite_mask_stays_infinite() -> None:
    graph = rewritten(single(moai.sdpa.default, (*[X[None, None]] * 3, randn(8, 8), False, None, False)), "bf16")
    mask = torch.tensor([math.inf, -math.inf, -3.4e38, 3.4e38, 0.0, 1.0, -2.0, 0.5]).repeat(8, 1)
    id_ = nodes_of(graph, moai.sdpa.default)[0].args[3].id
    position = next(k for k, n in enumerate(graph.nodes) if n.outs == id_)
    cut = replace(graph, nodes=graph.nodes[: position + 1], outputs=(replace(graph.outputs[0], id=id_),))
    (found,) = evaluate(cut, [*[X[None, None]] * 3, mask], [])
    largest = torch.finfo(BF16).max
    expected = torch.tensor([math.inf, -math.inf, -largest, largest, 0.0, 1.0, -2.0, 0.5])
    assert found.dtype == BF16
    assert torch.equal(found[0].float(), expected)


def test_scores_masked_with_the_least_number_of_fp32_stay_finite() -> None:
    def fn(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scores = x @ w
        nowhere = torch.ones_like(scores, dtype=torch.bool)
        least = torch.full((), torch.finfo(FP32).min)
        return (
            torch.softmax(scores.masked_fill(nowhere, torch.finfo(FP32).min), -1),
            torch.softmax(torch.where(nowhere, least, scores), -1),
        )

    _, found = computed(fn, [W], [X])
    for weights in found:
        torch.testing.assert_close(weights, torch.full((8, 16), 1 / 16))


def test_positions_times_frequencies_are_not_rounded() -> None:
    """bf16 holds no odd number above 256."""
    frequencies, positions = 1 / 10000 ** (torch.arange(8) / 8), torch.arange(1000)

    def fn(f: torch.Tensor, p: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.cos((f[None, :, None] @ p.float()[None, None, :]).transpose(1, 2)),)

    _, (found,) = computed(fn, [frequencies], [positions])
    torch.testing.assert_close(found, *fn(frequencies, positions), rtol=0, atol=1e-6)


def test_a_product_that_counts_is_exact() -> None:
    chosen = torch.arange(600).flip(0)

    def fn(w: torch.Tensor, c: torch.Tensor) -> tuple[torch.Tensor]:
        one_hot = (c[:, None] == torch.arange(600)).float()
        return ((one_hot @ torch.arange(600).float()[:, None]).long(),)

    _, (found,) = computed(fn, [W], [chosen])
    assert torch.equal(found[:, 0], chosen)


def test_integers_booleans_and_doubles_are_left_alone() -> None:
    def fn(d: torch.Tensor, i: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return d @ d, i * 3 + 1, (x > 0) & (i > 0), x.double() @ d

    graph = trace(fn, [W.double()], [torch.arange(16), X])
    assert not [i for i, t in enumerate(rewritten(graph, "bf16").types) if t.dtype == BF16]


def test_complex_rotations_are_those_of_fp32() -> None:
    turn = torch.polar(torch.ones(8, 8), randn(8, 8))

    def fn(w: torch.Tensor, t: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        pairs = torch.view_as_complex((x @ w).reshape(8, 8, 2).contiguous())
        return (torch.view_as_real(pairs * t),)

    for precision, to in ("bf16", BF16), ("fp64", FP64):
        graph, (found,) = computed(fn, [W, turn], [X], precision)
        assert {t.dtype for t in graph.types if t.dtype.is_complex} >= {torch.complex64}
        rounded = (X.to(to) @ W.to(to)).float().reshape(8, 8, 2)
        torch.testing.assert_close(found, torch.view_as_real(torch.view_as_complex(rounded) * turn))


def test_a_conversion_that_the_script_wrote_is_kept() -> None:
    _, (found, whole) = computed(lambda w, x: ((x @ w).to(FP64), (x @ w).to(torch.int64)), [W], [X])
    rounded = X.bfloat16() @ W.bfloat16()
    assert torch.equal(found, rounded.double())
    assert torch.equal(whole, rounded.long())


def test_an_embedding_gives_rows_of_the_fp32_table() -> None:
    def fn(w: torch.Tensor, i: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.nn.functional.embedding(i, w) @ w.t(),)

    graph, _ = computed(fn, [W], [torch.arange(5)])
    (node,) = nodes_of(graph, aten.embedding.default)
    assert dtypes(graph, node)[1] == [FP32]
    assert len(casts_of(graph, graph.inputs[0].id)) == 1


def test_nothing_is_computed_that_nobody_reads() -> None:
    graph, _ = computed(lambda w, x: (x @ w.t(),), [W], [X])
    read = {o.id for o in graph.outputs}
    for node in reversed(graph.nodes):
        assert node.outs in read
        read.update(a.id for a in node.args if isinstance(a, Ref))


def test_fp64_casts_an_input_once_and_an_output_at_the_end() -> None:
    graph, (a, b) = computed(lambda w, x: (x @ w, (x @ w).exp().sum()), [W], [X], "fp64")
    assert [len(casts_of(graph, i.id)) for i in graph.inputs] == [1, 1]
    assert torch.equal(a, (X.double() @ W.double()).float())
    assert torch.equal(b, (X.double() @ W.double()).exp().sum().float())


def test_fp64_reaches_types_that_operators_are_told() -> None:
    def fn(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (torch.softmax(x @ w, -1, dtype=FP32).sum(0, dtype=FP32) / torch.full((16,), 3.0),)

    graph, _ = computed(fn, [W], [X], "fp64")
    assert not [n for n in graph.nodes if FP32 in dtypes(graph, n)[1] and n.op is not aten._to_copy.default]


def test_fp64_does_not_reinterpret_bits() -> None:
    _, (found,) = computed(lambda w, x: ((x + w[:8]).view(torch.int32) >> 16,), [W], [X], "fp64")
    assert found.shape == (8, 16)
    torch.testing.assert_close(found, (X + W[:8]).view(torch.int32) >> 16)


def test_fp64_leaves_half_precision_as_the_script_has_it() -> None:
    def fn(w: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor]:
        return ((x.bfloat16() @ w.bfloat16()).float() + 1,)

    graph, (found,) = computed(fn, [W], [X], "fp64")
    assert dtypes(graph, product_of(graph)) == ([BF16, BF16], [BF16])
    assert torch.equal(found, fn(W, X)[0])
