"""Questions with only one answer, whatever the data, end no segment."""

from __future__ import annotations

import pytest
import torch

from tests.capture.compare import assert_same, randn
from tests.capture.conftest import Observed


@pytest.mark.parametrize("question", [torch.isnan, torch.isinf])
def test_what_nan_to_num_makes_is_finite(capture: Observed, question) -> None:
    before, found = capture.segments, torch.nan_to_num(randn(4).to("cuda") / 0)
    assert_same(question(found).cpu(), torch.zeros(4, dtype=torch.bool))
    assert capture.segments == before


def test_infinity_in_the_place_of_nan_is_noticed(capture: Observed) -> None:
    x = torch.nan_to_num(randn(3).to("cuda") / 0, posinf=float("inf"))
    assert_same(torch.isinf(x).cpu(), randn(3) > 0)


def test_what_is_written_since_is_noticed(capture: Observed) -> None:
    x = torch.nan_to_num(randn(3).to("cuda"))
    x.div_(0)
    assert torch.isinf(x).cpu().all()


def test_an_answer_that_is_written_over_is_read(capture: Observed) -> None:
    answer = torch.isnan(torch.nan_to_num(randn(3).to("cuda")))
    answer.fill_(True)
    assert answer.cpu().all()


def test_what_is_finite_by_chance_is_read(capture: Observed) -> None:
    before = capture.segments
    assert not torch.isnan(randn(3).to("cuda") * 2).cpu().any()
    assert capture.segments - before == 1
