"""A script whose steps never repeat does not fill memory with what was learned of them."""

from __future__ import annotations

import pytest
import torch

from moai.capture import meta
from moai.capture import recorder as recorder_module
from tests.capture.conftest import Observed


def calls_in_tree(observed: Observed) -> int:
    stack, count = [observed.recorder.root], 0
    while stack:
        call = stack.pop()
        stack.extend(call.children)
        count += 1
    return count


def test_steps_that_never_repeat_are_forgotten_and_still_right(
    capture: Observed, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder_module, "MAX_CALLS", 50)
    kept = torch.zeros(2, device="cuda")
    for length in range(1, 41):
        x = torch.ones(length, device="cuda") * 2
        kept = kept + x.sum()
        assert kept.tolist() == [length * (length + 1)] * 2
    assert capture.executor.forgotten >= 2
    assert calls_in_tree(capture) < 100


def test_a_step_is_learned_again_after_forgetting(capture: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder_module, "MAX_CALLS", 5)
    x = torch.ones(3, device="cuda")
    for _ in range(4):
        for _ in range(3):
            x = x * 2
        assert x[0].item() > 1
    monkeypatch.setattr(recorder_module, "MAX_CALLS", 1000)
    (x * 2).sum().item()
    before = capture.recorder.stats.recorded
    (x * 2).sum().item()
    assert capture.recorder.stats.recorded == before


def test_shapes_that_never_come_again_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meta, "_MOST", 8)
    monkeypatch.setattr(meta, "_results", {})
    for length in range(1, 21):
        assert (torch.ones(length, device="cuda") * 2).tolist() == [2.0] * length
    assert 0 < len(meta._results) <= 8
