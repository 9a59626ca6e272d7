"""Small whole numbers whose values are at hand are worked out at once: a text's next token is no new step."""

from __future__ import annotations

import random

import pytest
import torch
from torch import nn

from tests.capture.compare import assert_same
from tests.capture.conftest import Observed

WIDTH = 50


def words(device: str) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(WIDTH, 8), nn.Linear(8, WIDTH)).to(device)


@torch.no_grad()
def text(device: str, tokens: int) -> torch.Tensor:
    """A text of which each token depends on the last one and on a mask of all."""
    model, ids = words(device), torch.tensor([[3, 1, 4], [1, 5, 9]]).to(device)
    mask = torch.ones_like(ids)
    for _ in range(tokens):
        position = mask.cumsum(-1)[:, -1:] - 1
        seen = torch.arange(32, device=device)[None] <= position
        scores = model(ids[:, -1:])[:, -1] + seen.sum(-1, keepdim=True)
        ids = torch.cat([ids, scores.argmax(-1, keepdim=True)], dim=-1)
        mask = torch.cat([mask, mask.new_ones((2, 1))], dim=-1)
    return ids.cpu()


def test_every_token_of_a_text_is_the_same_step(capture: Observed) -> None:
    found = text("cuda", 12)
    assert torch.equal(found, text("cpu", 12))
    assert len(capture.graphs) == 1
    assert len(capture.graphs[0].nodes) < 15


def test_a_token_ends_one_segment_however_much_is_read_of_it(capture: Observed) -> None:
    model, ids, before = words("cuda"), torch.zeros(1, 1, dtype=torch.long).cuda(), capture.segments
    with torch.no_grad():
        for _ in range(3):
            ids = torch.cat([ids, model(ids[:, -1:])[:, -1].argmax(-1, keepdim=True)], dim=-1)
            assert not bool((ids == -1).any()) and int(ids.max()) < WIDTH
    assert capture.segments - before == 3


@torch.no_grad()
def counted(device: str) -> torch.Tensor:
    weight, count = torch.full((3,), 0.5).to(device), torch.tensor([1, 2, 3]).to(device)
    first = weight * count
    count.add_(10)
    count[1:] *= 2
    second = weight * count
    count.zero_()
    return torch.stack([first, second, weight * count]).cpu()


def test_a_number_that_is_written_between_two_uses_has_both_values(capture: Observed) -> None:
    assert_same([counted("cuda")], [counted("cpu")])


def test_with_gradients_numbers_are_part_of_the_step(capture: Observed) -> None:
    weight, ids = torch.ones(4, requires_grad=True, device="cuda"), torch.tensor([1, 2]).cuda()
    (weight[ids + 1].sum()).backward()
    assert weight.grad is not None and weight.grad.cpu().tolist() == [0.0, 0.0, 1.0, 1.0]
    assert "aten.add.Tensor" in [str(node.op) for node in capture.graphs[0].nodes]


@torch.no_grad()
def test_large_masks_are_work_for_devices(capture: Observed) -> None:
    row = torch.arange(600, device="cuda")
    found = torch.where(row[:, None] >= row, 1.0, 0.0).sum()
    assert found.cpu().item() == 600 * 601 / 2
    assert "aten.ge.Tensor" in [str(node.op) for node in capture.graphs[0].nodes]


@torch.no_grad()
def test_counting_right_answers_ends_no_segment(capture: Observed) -> None:
    model, right, before = words("cuda"), torch.zeros((), dtype=torch.long, device="cuda"), capture.segments
    for answer in range(3):
        ids = torch.tensor([answer]).cuda()
        right += (model(ids).argmax(-1) == ids).sum()
    assert capture.segments == before
    assert 0 <= right.item() <= 3


@torch.no_grad()
def program(device: str, seed: int) -> torch.Tensor:
    """A random program on a few whole numbers, some of which meet what devices compute."""
    dice = random.Random(seed)
    weight = torch.linspace(-1, 1, 6).to(device)
    numbers = [torch.arange(6, device=device), torch.tensor([5, 3, 1, 0, 2, 4]).to(device)]
    found = []
    for _ in range(14):
        x, y = dice.choice(numbers), dice.choice(numbers)
        step = dice.randrange(8)
        if step == 0:
            numbers.append((x + y) % 6)
        elif step == 1:
            numbers.append(torch.where(x > y, x, y).clone())
        elif step == 2:
            x[dice.randrange(3) :].add_(1).remainder_(6)
        elif step == 3:
            x.copy_(y.flip(0))
        elif step == 4:
            found.append(weight * x + (y == 2))
        elif step == 5:
            weight = weight[y % 6] + 0.25
        elif step == 6:
            numbers.append(torch.cat([x[:3], weight.argsort()[:3]]))
        else:
            x[1] = int(y.sum()) % 6
    return torch.cat([*found, weight, torch.stack([n.to(weight.dtype) for n in numbers]).flatten()]).cpu()


@pytest.mark.parametrize("seed", range(40))
def test_programs_on_whole_numbers_have_the_numbers_of_one_device(seed: int, capture: Observed) -> None:
    assert_same([program("cuda", seed)], [program("cpu", seed)])


def test_what_is_made_of_numbers_alone_is_no_data(capture: Observed) -> None:
    weight = torch.ones(4, 4, requires_grad=True, device="cuda")
    x = torch.ones(8, 4).cuda()
    loss = (x @ (weight + torch.eye(4, device="cuda"))).sum()
    loss.backward()
    assert loss.item() == 8 * (16 + 4)
    (graph,) = capture.graphs
    assert [graph.types[i.id].shape for i in graph.inputs if i.batch] == [(8, 4)]
