"""Large results that a script holds without using them are not kept; small or used ones always are."""

from __future__ import annotations

import os

import pytest
import torch

from tests.capture.compare import assert_same, randn
from tests.capture.conftest import Observed

WIDE = 1 << 16  # 8 rows of it are 2 MiB: large


class Script:
    """A training script whose output is large, and held in `self.out` until the next step's takes its place."""

    def __init__(self, device: str = "cuda") -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = torch.nn.Linear(2, WIDE).to(device)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.out: torch.Tensor | None = None

    def step(self, i: int, retain_graph: bool = False) -> torch.Tensor:
        self.out = self.model(randn(8, 2, seed=i).to(self.device))
        loss = self.out.pow(2).mean()
        loss.backward(retain_graph=retain_graph)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def outputs_of_size(capture: Observed, shape: tuple[int, ...]) -> list[int]:
    """How many outputs of `shape` each graph has."""
    return [sum(graph.types[o.id].shape == shape for o in graph.outputs) for graph in capture.graphs]


def test_a_large_result_that_was_held_and_not_used_is_not_kept_again(capture: Observed) -> None:
    script = Script()
    for i in range(5):
        script.step(i).item()
    counts = outputs_of_size(capture, (8, WIDE))
    assert (counts[0], counts[-1]) == (1, 0)


def test_reading_what_was_not_kept_says_what_it_was_and_what_to_do(capture: Observed) -> None:
    script = Script()
    for i in range(5):
        script.step(i).item()
    with pytest.raises(RuntimeError) as raised:
        script.out.sum().item()
    message = str(raised.value)
    line = Script.step.__code__.co_firstlineno + 1
    assert f"shape [8, {WIDE}] (2 MiB)" in message
    assert f"{os.path.basename(__file__)}:{line}" in message
    assert "MOAI_KEEP_OUTPUTS=1" in message


def test_the_user_may_have_all_results_kept(capture: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOAI_KEEP_OUTPUTS", "1")
    script, reference = Script(), Script("cpu")
    for i in range(5):
        script.step(i).item()
        reference.step(i)
    assert_same(script.out, reference.out)


def test_a_result_that_is_used_after_every_step_is_kept(capture: Observed) -> None:
    script, reference = Script(), Script("cpu")
    for i in range(5):
        script.step(i).item()
        reference.step(i)
        assert_same(script.out[:, :3], reference.out[:, :3])


def test_a_result_that_is_read_before_the_step_ends_is_kept_even_if_it_was_not_before(capture: Observed) -> None:
    script, reference = Script(), Script("cpu")
    for i in range(5):
        loss = script.step(i)
        reference.step(i)
        if i < 4:
            loss.item()
    assert_same(script.out.cpu(), reference.out)


def test_a_retained_graph_keeps_its_results(capture: Observed) -> None:
    script, reference = Script(), Script("cpu")
    for i in range(5):
        script.step(i, retain_graph=True).item()
        reference.step(i, retain_graph=True)
    assert_same(script.out, reference.out)


def test_a_hidden_state_carried_from_step_to_step_is_kept(capture: Observed) -> None:
    def train(device: str) -> list[float]:
        torch.manual_seed(0)
        mix = torch.nn.Linear(4, 4).to(device)
        optimizer = torch.optim.SGD(mix.parameters(), lr=0.1)
        hidden, losses = torch.zeros(WIDE * 2, 4).to(device), []
        for i in range(6):
            hidden = mix(hidden.detach() + randn(1, 4, seed=i).to(device)).tanh()
            loss = hidden.pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    assert_same(train("cuda"), train("cpu"))


def test_small_results_are_always_kept(capture: Observed) -> None:
    outs = []
    weight = torch.nn.Parameter(randn(3).to("cuda"))
    for i in range(5):
        out = weight * randn(3, seed=i).to("cuda")
        out.sum().backward()
        outs.append(out.detach())
    assert_same(outs, [randn(3) * randn(3, seed=i) for i in range(5)])


def test_results_without_a_backward_are_always_kept(capture: Observed) -> None:
    weight, held = randn(2, WIDE).to("cuda"), None
    for i in range(5):
        with torch.no_grad():
            held = randn(8, 2, seed=i).to("cuda") @ weight
        held[0, 0].item()
        del held
    held = randn(8, 2).to("cuda") @ weight
    weight.sum().item()
    assert_same(held, randn(8, 2) @ randn(2, WIDE), rtol=1e-4, atol=1e-5)


def test_a_value_that_was_kept_stays_when_a_later_step_has_used_it(capture: Observed) -> None:
    script = Script()
    for i in range(3):
        script.step(i).item()  # held unused: the model's result is not kept from now on
    script.step(3)
    kept = script.out
    expected = kept.cpu()  # but this one is wanted before its step ends
    for i in range(4, 6):
        (script.model(randn(8, 2, seed=i).cuda()) + kept.detach()).sum().backward()
        script.optimizer.step()
        script.optimizer.zero_grad()
        randn(1, seed=i).cuda()  # the next batch ends the step
        assert_same(kept, expected)
