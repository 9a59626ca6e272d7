"""A function that a script calls again and again is done again without being called, if it can be."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from moai.capture.stretch import Stretch
from tests.capture.conftest import Observed

Function = Callable[[torch.Tensor], torch.Tensor]


class Cache:
    """Rows that are written one after another, and the number of those that are."""

    def __init__(self, device: str) -> None:
        self.weight = torch.full((3, 3), 0.5).to(device)
        self.rows = torch.zeros(8, 3).to(device)
        self.count = torch.tensor(0).to(device)

    def add(self, x: torch.Tensor) -> torch.Tensor:
        """What follows from all rows, if `x` is the next."""
        at = torch.arange(1, device=x.device) + self.count
        self.count.add_(1)
        self.rows.index_copy_(0, at, x @ self.weight)
        seen = torch.arange(8, device=x.device) < self.count
        return (self.rows * seen[:, None]).cumsum(0)[-1:]


@torch.no_grad()
def taped(capture: Observed, function: Function, x: torch.Tensor) -> tuple[torch.Tensor, Stretch | None, str]:
    return capture.recorder.taped(lambda: function(x), [x], lambda y: [y])


@torch.no_grad()
def again(capture: Observed, stretch: Stretch | None, *given: torch.Tensor) -> Sequence[torch.Tensor] | None:
    assert stretch is not None
    return stretch.again(capture.recorder, given)


def test_done_again_it_gives_what_calling_it_gives(capture: Observed) -> None:
    ours, plain = Cache("cuda"), Cache("cpu")
    xs = [torch.randn(1, 3) for _ in range(6)]
    expected = [plain.add(x) for x in xs]
    first, stretch, why = taped(capture, ours.add, xs[0].cuda())
    assert not why and torch.allclose(first.cpu(), expected[0])
    for x, wanted in zip(xs[1:4], expected[1:4], strict=True):
        results = again(capture, stretch, x.cuda())
        assert results is not None and torch.allclose(results[0].cpu(), wanted)
    # and what it has changed is as if it had been called
    assert int(ours.count) == 4 and torch.allclose(ours.rows.cpu()[:4], plain.rows[:4])
    with torch.no_grad():
        fifth = ours.add(xs[4].cuda())
    assert torch.allclose(fifth.cpu(), expected[4])
    assert len(capture.graphs) == 2  # what was just uploaded is another input than what a step has made


def test_what_follows_it_is_part_of_the_same_step(capture: Observed) -> None:
    ours, plain, before = Cache("cuda"), Cache("cpu"), capture.segments
    with torch.no_grad():
        for k in range(4):
            x = torch.full((1, 3), float(k))
            given = x.cuda()
            if k == 0:
                y, stretch, _ = taped(capture, ours.add, given)
            else:
                results = again(capture, stretch, given)
                assert results is not None
                y = results[0]
            assert torch.allclose((y * 2 + given).cpu(), plain.add(x) * 2 + x)
    assert capture.segments - before == 4 and len(capture.graphs) == 2


KEPT: list[torch.Tensor] = []


@pytest.mark.parametrize(
    "function, why",
    [
        (lambda x: x * 2 if x.sum() > 0 else x * 3, "reads"),
        (lambda x: x * torch.tensor([1.0, 2.0, 3.0]).cuda(), "uploads"),
        (lambda x: torch.nn.functional.dropout(x, 0.5), "new at every run"),
        (lambda x: KEPT.append(x * 2) or x * 3, "keeps a tensor"),
        (lambda x: x, "empty"),
        (lambda x: (x[:, 0] > 0).nonzero(), "depends on data"),
    ],
)
def test_a_function_that_does_more_is_not_repeated(capture: Observed, function: Function, why: str) -> None:
    x = torch.ones(1, 3).cuda()
    _, stretch, said = taped(capture, function, x)
    KEPT.clear()
    assert stretch is None and why in said


def test_it_is_not_repeated_where_another_begins(capture: Observed) -> None:
    x = torch.ones(1, 3).cuda()
    y = x + 1
    _, stretch, why = taped(capture, lambda x: x * 2, x)
    assert stretch is None and "middle" in why
    assert torch.equal(y.cpu(), torch.full((1, 3), 2.0))


@pytest.mark.parametrize("other", [torch.ones(2, 3), torch.ones(1, 3).double(), torch.ones(3, 1).t()])
def test_it_is_not_repeated_for_tensors_of_another_kind(capture: Observed, other: torch.Tensor) -> None:
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    y, stretch, _ = taped(capture, twice, torch.ones(1, 3).cuda())
    assert y.cpu().sum() == 6
    assert again(capture, stretch, other.cuda()) is None
    assert capture.recorder.segment.cursor is capture.recorder.root


def test_it_is_not_repeated_with_one_tensor_twice(capture: Observed) -> None:
    x, y = torch.ones(1, 3).cuda(), torch.ones(1, 3).cuda()
    with torch.no_grad():
        z, stretch, _ = capture.recorder.taped(lambda: x.add_(y) + y, [x, y], lambda z: [z])
    assert z.cpu().sum() == 9
    assert again(capture, stretch, x, x) is None
