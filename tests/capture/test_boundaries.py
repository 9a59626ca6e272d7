"""Where a segment ends: a step of a script is one segment, and its graph is built once."""

from __future__ import annotations

import gc
import os

import pytest
import torch

from tests.capture.compare import assert_same, randn
from tests.capture.conftest import Observed, on_the_host


class Script:
    """A training script of a two-layer model on `device`."""

    def __init__(self, device: str = "cuda", dtype: torch.dtype = torch.float32) -> None:
        torch.manual_seed(0)
        self.device = device
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 3)).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)

    def batch(self, i: int) -> torch.Tensor:
        return randn(2, 3, seed=i).to(self.device)

    def loss(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).pow(2).mean()

    def step(self, i: int) -> torch.Tensor:
        """One optimizer step; nothing is read."""
        loss = self.loss(self.batch(i))
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def weights(self) -> list[torch.Tensor]:
        return [p.detach().cpu() for p in self.model.parameters()]


def expected_weights(steps: int) -> list[torch.Tensor]:
    script = Script("cpu")
    for i in range(steps):
        script.step(i)
    return script.weights()


# ---------------------------------------------------------------------- one segment a step


def test_an_upload_after_an_optimizer_step_ends_the_segment(capture: Observed) -> None:
    script, before = Script(), capture.segments
    for i in range(5):
        script.step(i)
    assert capture.segments - before == 4  # the last one has not been asked for
    assert_same(script.weights(), expected_weights(5))
    assert capture.segments - before == 5


def test_a_read_of_the_loss_ends_the_segment(capture: Observed) -> None:
    script, before = Script(), capture.segments
    losses = [script.step(i).item() for i in range(5)]
    assert capture.segments - before == 5
    reference = Script("cpu")
    assert_same(losses, [reference.step(i).item() for i in range(5)])


def test_a_script_that_keeps_its_data_on_the_device_gets_a_segment_a_step(capture: Observed) -> None:
    script = Script()
    batches = [script.batch(i) for i in range(5)]
    script.batch = lambda i: batches[i]  # type: ignore[method-assign]
    before = capture.segments
    for i in range(5):
        script.step(i)
    assert capture.segments - before == 4
    assert_same(script.weights(), expected_weights(5))


def test_slices_of_data_on_the_device_are_not_a_new_graph_each(capture: Observed) -> None:
    script = Script()
    data = torch.cat([randn(2, 3, seed=i) for i in range(5)]).to("cuda")
    script.batch = lambda i: data[2 * i : 2 * i + 2].clone()  # type: ignore[method-assign]
    for i in range(5):
        script.step(i)
    assert_same(script.weights(), expected_weights(5))


def test_accumulating_gradients_inside_the_script_is_a_segment_per_batch(capture: Observed) -> None:
    def train(script: Script, steps: int) -> list[torch.Tensor]:
        for step in range(steps):
            for micro in range(3):
                (script.loss(script.batch(3 * step + micro)) / 3).backward()
            script.optimizer.step()
            script.optimizer.zero_grad()
        return script.weights()

    before = capture.segments
    weights = train(Script(), 4)
    assert capture.segments - before == 12
    assert_same(weights, train(Script("cpu"), 4))
    n_graphs = len(capture.graphs)
    assert n_graphs <= 5  # first, middle and last batch; the last of the first step makes the optimizer's state


def test_evaluation_without_gradients_is_a_segment_per_read(capture: Observed) -> None:
    script, reference = Script(), Script("cpu")

    def evaluate(script: Script) -> list[float]:
        with torch.no_grad():
            return [script.loss(script.batch(i)).item() for i in range(4)]

    before = capture.segments
    assert_same(evaluate(script), evaluate(reference))
    assert capture.segments - before == 4
    assert len(capture.graphs) == 1


def test_evaluation_that_is_never_read_does_not_grow_without_bound(capture: Observed, monkeypatch) -> None:
    monkeypatch.setattr("moai.capture.recorder.LONG_SEGMENT", 20)
    script, before = Script(), capture.segments
    total = torch.zeros(()).to("cuda")
    with torch.no_grad():
        for i in range(40):
            total += script.loss(script.batch(i))
    assert capture.segments - before > 5
    reference = Script("cpu")
    assert_same(total, sum(reference.loss(reference.batch(i)) for i in range(40)))


def test_a_scalar_upload_within_a_step_ends_nothing(capture: Observed) -> None:
    script, before = Script(), capture.segments
    loss = script.loss(script.batch(0))
    loss.backward()
    scaled = loss.detach() * torch.tensor(2.0).to("cuda")
    assert capture.segments == before
    assert_same(scaled, loss.detach().cpu() * 2)


# ---------------------------------------------------------------------- a steady script builds nothing


def test_few_graphs_until_steady_and_none_after(capture: Observed) -> None:
    script = Script()
    for i in range(4):
        script.step(i)
    recorded, graphs = capture.recorder.stats.recorded, len(capture.graphs)
    for i in range(4, 12):
        script.step(i)
    assert graphs <= 4
    assert (capture.recorder.stats.recorded, len(capture.graphs)) == (recorded, graphs)


def test_a_step_that_reads_elsewhere_now_and_then_is_replayed_once_it_was_seen(capture: Observed) -> None:
    script = Script()

    def step(i: int) -> None:
        loss = script.loss(script.batch(i))
        if i % 3 == 2:
            loss.item()
        loss.backward()
        script.optimizer.step()
        script.optimizer.zero_grad()

    for i in range(6):
        step(i)
    recorded, graphs = capture.recorder.stats.recorded, len(capture.graphs)
    for i in range(6, 18):
        step(i)
    assert (capture.recorder.stats.recorded, len(capture.graphs)) == (recorded, graphs)
    assert_same(script.weights(), expected_weights(18))


def test_a_changed_branch_says_what_changed_and_where(capture: Observed) -> None:
    def step(other_branch: bool) -> None:
        x = randn(3).to("cuda") * 2
        y = x.sigmoid() if other_branch else x.tanh()  # the line that is named
        y.sum().item()

    step(False)
    step(True)
    line = step.__code__.co_firstlineno + 2
    assert capture.causes[0] == ""
    assert "aten.sigmoid.default instead of aten.tanh.default" in capture.causes[1]
    assert f"{os.path.basename(__file__)}:{line}" in capture.causes[1]


def test_a_changed_shape_says_so(capture: Observed) -> None:
    for length in (3, 5):
        (randn(length).to("cuda") * 2).sum().item()
    assert "aten.mul.Tensor with other arguments (shapes [5])" in capture.causes[1]


def test_values_held_by_the_script_say_so(capture: Observed) -> None:
    held = []
    for hold in (False, True):
        x = randn(3).to("cuda")
        y = x * 2
        z = y.sum()
        if hold:
            held.append(y)
        del y
        z.item()
    assert capture.causes[1] == "other values are held at its end"


# ---------------------------------------------------------------------- memory


def live_storages() -> int:
    gc.collect()
    return sum(type(o) is torch.UntypedStorage and o.device.type == "cuda" for o in gc.get_objects())


def test_nothing_accumulates_over_the_steps(capture: Observed) -> None:
    script = Script()
    for i in range(4):
        script.step(i).item()
    before = live_storages()
    for i in range(4, 24):
        script.step(i).item()
    assert live_storages() == before


def test_what_the_script_does_not_hold_is_not_an_output(capture: Observed) -> None:
    script = Script()
    for i in range(4):
        script.step(i)
    graph = capture.graphs[-1]
    state = 4 * 3  # four parameters and their two moments
    assert len(graph.outputs) == state
    assert all(o.replaces is not None for o in graph.outputs)


def test_overwritten_and_dead_inputs_may_be_reused(capture: Observed) -> None:
    script = Script()
    for i in range(4):
        script.step(i)
    graph = capture.graphs[-1]
    replaced = {o.replaces for o in graph.outputs if o.replaces is not None}
    assert all(graph.inputs[i].dies for i in replaced)
    assert [i.dies for i in graph.inputs if i.batch] == [True]


# ---------------------------------------------------------------------- small values on the host


@on_the_host
def test_a_small_value_of_uploaded_data_is_read_without_ending_the_segment(capture: Observed) -> None:
    mask = torch.ones(2, 8, dtype=torch.long).to("cuda")
    before, reads = capture.segments, capture.recorder.stats.host_reads
    assert bool((mask == 1).all())
    assert (capture.segments - before, capture.recorder.stats.host_reads - reads) == (0, 1)


@on_the_host
def test_what_was_read_on_the_host_is_still_there_for_the_step(capture: Observed) -> None:
    x = randn(4).to("cuda")
    doubled = x.mul_(2)
    assert_same(doubled.sum().item(), (randn(4) * 2).sum())
    doubled.add_(1)
    capture.recorder.flush()
    assert_same(x, randn(4) * 2 + 1)


@on_the_host
def test_a_value_that_needs_much_work_is_not_worked_out_on_the_host(capture: Observed) -> None:
    x = randn(4).to("cuda")
    for _ in range(100):
        x = x * 1.01
    before = capture.segments
    x.sum().item()
    assert capture.segments - before == 1


@on_the_host
def test_a_second_question_about_a_loss_is_answered_on_the_host(capture: Observed) -> None:
    """transformers' Trainer asks of every loss whether it is NaN, and then whether it is infinite."""
    script, before, reads = Script(), capture.segments, capture.recorder.stats.host_reads
    for i in range(3):
        loss = script.step(i)
        assert not bool(torch.isnan(loss)) and not bool(torch.isinf(loss))
    assert (capture.segments - before, capture.recorder.stats.host_reads - reads) == (3, 3)


@on_the_host
def test_a_matrix_product_is_left_to_the_devices(capture: Observed) -> None:
    before, x = capture.segments, randn(4, 4).to("cuda")
    assert_same((x @ x).sum().item(), (randn(4, 4) @ randn(4, 4)).sum())
    assert capture.segments - before == 1


@pytest.mark.parametrize("on_device", [False, True])
@on_the_host
def test_random_numbers_read_on_the_host_are_those_of_the_graph(capture: Observed, on_device: bool) -> None:
    torch.manual_seed(3)
    x = torch.rand(4, device="cuda")
    if on_device:
        capture.recorder.flush()
    first = x.cpu()
    torch.manual_seed(3)
    assert torch.equal(torch.rand(4, device="cuda").cpu(), first)


@on_the_host
def test_a_question_about_the_batch_is_answered_however_long_the_forward_pass_is(capture: Observed) -> None:
    x, labels = randn(4).to("cuda"), torch.tensor([1, -100, 2, -100]).to("cuda")
    n_valid = (labels * 1.0 > 0).sum()
    for _ in range(500):
        x = x * 1.01
    before = capture.segments
    assert n_valid > 1 and not n_valid > 2
    assert capture.segments == before
