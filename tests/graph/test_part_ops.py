"""Operators on one part of the classes, of a vocabulary, of the heads: all parts together give the plain operator."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

import moai.graph.part_ops

aten = torch.ops.aten
moai = torch.ops.moai

pytestmark = pytest.mark.usefixtures("double_precision")

N, CLASSES, WIDTH = 11, 7, 5
CUTS = [(0, 7), (0, 4, 7), (0, 1, 5, 7)]
NONE, SUM = 0, 2


def targets() -> torch.Tensor:
    """Every class occurs; -100 does, and so does class 2, which some tests ignore."""
    found = torch.arange(N) % CLASSES
    found[-2:] = -100
    return found


def log_probabilities(impossible: int | None = None) -> torch.Tensor:
    """Of N samples; `impossible` is a class that has probability 0 in every one of them."""
    scores = torch.randn(N, CLASSES)
    if impossible is not None:
        scores[:, impossible] = float("-inf")
    return scores.log_softmax(1)


def added(terms: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(terms)).sum(0)


cuts = pytest.mark.parametrize("cut", CUTS, ids=str)
ignored = pytest.mark.parametrize("ignore_index", [-100, 2])
weighted = pytest.mark.parametrize(
    "weight", [None, torch.arange(1.0, CLASSES + 1, dtype=torch.float64) / 4], ids=["unweighted", "weighted"]
)


def counted(target: torch.Tensor, ignore_index: int) -> torch.Tensor:
    """The plain operators know one number that is ignored; the others have to be classes."""
    return target if ignore_index == -100 else target.clamp(min=0)


# -- losses


@cuts
@ignored
@weighted
@pytest.mark.parametrize("reduction", [NONE, SUM])
def test_the_losses_of_all_parts_add_up(cut, ignore_index, weight, reduction):
    scores, target = log_probabilities(), counted(targets(), ignore_index)
    parts = [moai.class_loss(scores[:, a:b], target, weight, reduction, ignore_index, a) for a, b in pairwise(cut)]
    plain = F.nll_loss(
        scores, target, weight, ignore_index=ignore_index, reduction="none" if reduction == NONE else "sum"
    )
    torch.testing.assert_close(added(parts), plain)


@cuts
def test_an_impossible_class_that_is_no_target_leaves_the_loss_a_number(cut):
    scores, target = log_probabilities(impossible=3), targets()
    target[target == 3] = -100
    parts = [moai.class_loss(scores[:, a:b], target, None, SUM, -100, a) for a, b in pairwise(cut)]
    torch.testing.assert_close(added(parts), F.nll_loss(scores, target, reduction="sum"))
    assert added(parts).isfinite()


@cuts
def test_an_impossible_target_has_infinite_loss(cut):
    scores = log_probabilities(impossible=3)
    parts = [moai.class_loss(scores[:, a:b], targets(), None, SUM, -100, a) for a, b in pairwise(cut)]
    assert added(parts) == float("inf")


@ignored
@weighted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_weight_of_the_targets_that_count_needs_no_scores(ignore_index, weight, dtype):
    target = counted(targets(), ignore_index)
    cast = None if weight is None else weight.to(dtype)
    _, plain = aten.nll_loss_forward(log_probabilities().to(dtype), target, cast, SUM, ignore_index)
    torch.testing.assert_close(moai.class_weight(target, cast, ignore_index, dtype), plain)


@cuts
@ignored
@weighted
@pytest.mark.parametrize("reduction", [NONE, SUM])
def test_every_part_has_its_gradients(cut, ignore_index, weight, reduction):
    scores, target = log_probabilities(), counted(targets(), ignore_index)
    grad = torch.randn(N) if reduction == NONE else torch.tensor(0.7)
    sizes = [(a, b) for a, b in pairwise(cut)]
    parts = [moai.class_loss_backward(grad, target, weight, ignore_index, (N, b - a), a) for a, b in sizes]
    _, total = aten.nll_loss_forward(scores, target, weight, reduction, ignore_index)
    plain = aten.nll_loss_backward(grad, scores, target, weight, reduction, ignore_index, total)
    torch.testing.assert_close(torch.cat(parts, 1), plain)


def test_no_target_counts():
    target = torch.full((N,), -100)
    assert moai.class_loss(log_probabilities(), target, None, SUM, -100, 0) == 0
    assert moai.class_weight(target, None, -100, torch.float64) == 0
    assert not moai.class_loss_backward(torch.ones(()), target, None, -100, (N, CLASSES), 0).any()


# -- embeddings


@cuts
def test_the_rows_of_all_parts_of_a_vocabulary_add_up(cut):
    table, indices = torch.randn(CLASSES, WIDTH), torch.randint(0, CLASSES, (3, 4))
    parts = [moai.embedding(table[a:b], indices, a) for a, b in pairwise(cut)]
    torch.testing.assert_close(added(parts), F.embedding(indices, table), rtol=0, atol=0)


def test_an_entry_elsewhere_does_not_spoil_a_part_that_holds_no_numbers():
    table = torch.full((2, WIDTH), float("nan"))
    assert not moai.embedding(table, torch.tensor([5, 6]), 2).any()


@cuts
@pytest.mark.parametrize("padding_idx", [-1, 0, 4])
def test_every_part_of_a_vocabulary_has_its_gradients(cut, padding_idx):
    grad, indices = torch.randn(3, 8, WIDTH), torch.randint(0, CLASSES, (3, 8))
    sizes = [(a, b) for a, b in pairwise(cut)]
    parts = [moai.embedding_backward(grad, indices, b - a, padding_idx, a) for a, b in sizes]
    plain = aten.embedding_dense_backward(grad, indices, CLASSES, padding_idx, False)
    torch.testing.assert_close(torch.cat(parts), plain)


# -- heads

KV, GROUP = 2, 3


@pytest.mark.parametrize("cut", [(0, 6), (0, 3, 6), (0, 2, 4, 6), (0, 1, 2, 3, 4, 5, 6), (0, 4, 6)], ids=str)
def test_every_query_head_has_its_key_head(cut):
    x = torch.randn(2, KV, 4, WIDTH)
    parts = [moai.repeat_heads(x, b - a, GROUP, a) for a, b in pairwise(cut)]
    torch.testing.assert_close(torch.cat(parts, 1), x.repeat_interleave(GROUP, 1), rtol=0, atol=0)


@pytest.mark.parametrize("cut", [(0, 6), (0, 3, 6), (0, 2, 4, 6), (0, 4, 6)], ids=str)
def test_the_gradients_of_repeated_heads_add_up(cut):
    grad = torch.randn(2, KV * GROUP, 4, WIDTH)
    parts = [moai.sum_heads(grad[:, a:b], KV, GROUP, a) for a, b in pairwise(cut)]
    torch.testing.assert_close(added(parts), grad.unflatten(1, (KV, GROUP)).sum(2))
