"""What a device holds is told apart: parameters, gradients, optimizer states, activations, and buffers."""

from __future__ import annotations

from dataclasses import fields

import pytest

from moai.graph.step_graph import StepGraph
from moai.lower.sampling import observe
from moai.plan.parse import parse
from moai.plan.work import Held, Memory
from tests.capture.conftest import capture  # noqa: F401 (a fixture)
from tests.lower.captured_steps import VOCABULARY, capturing, llama_with_adamw

# The forward's two halves, the backward's, and the optimizer.
FORWARD, OPTIMIZER = 1, 4
a_step = llama_with_adamw(
    batch=8,
    length=32,
    times=2,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=VOCABULARY,
    max_position_embeddings=32,
)


@pytest.fixture
def reads_on_the_host() -> bool:
    """The whole step is one segment."""
    return True


@pytest.fixture
def graph(capture, monkeypatch) -> StepGraph:  # noqa: F811
    return capturing(capture, monkeypatch)(a_step).graph


def held(graph: StepGraph, text: str, devices: int = 4) -> Held:
    return observe(graph, parse(text, devices)).held


def buffers(found: Held, place: int) -> float:
    known = found.parameters + found.states + found.gradients[place] + found.activations[place]
    return float(found.total[place] - known)


def about(nbytes: float):
    """But for losses, counts and constants."""
    return pytest.approx(nbytes, rel=0.01, abs=4096)


@pytest.mark.parametrize(
    "text", ["dp=4", "dp=2,tp=2", "dp=4,precision=bf16,recompute=full", "dp=4,distribute_param=true"]
)
def test_the_parts_are_all_that_is_held(graph, text):
    found = observe(graph, parse(text, 4)).sample()
    memory = found.less.memory
    assert sum(getattr(memory, f.name) for f in fields(Memory)) == memory.total
    assert all(getattr(memory, f.name) >= 0 for f in fields(Memory))
    assert memory.states == about(2 * memory.parameters)


@pytest.mark.parametrize("text", ["dp=4", "dp=2,tp=2", "tp=4", "dp=4,precision=bf16"])
def test_the_optimizer_finds_gradients_as_large_as_the_parameters_and_no_activations(graph, text):
    found = held(graph, text)
    assert found.gradients[OPTIMIZER] == about(found.parameters)
    assert found.activations[OPTIMIZER] == about(0)


def test_terms_are_gradients_until_they_are_summed(graph):
    """They are copied into a message, or the device keeps no more than its part of the sum."""
    spread, looped = (held(graph, text) for text in ("dp=4,distribute_param=true", "dp=4,micro=2"))
    assert spread.gradients[OPTIMIZER] == pytest.approx(4 * spread.parameters, rel=0.02)
    assert looped.gradients[OPTIMIZER] == about(2 * looped.parameters)


def test_before_the_first_backward_there_are_no_gradients(graph):
    found = held(graph, "dp=1", devices=1)  # several devices may have the memory of a message by then
    assert (found.gradients[FORWARD], buffers(found, FORWARD)) == (about(0), about(0))
    assert found.activations[FORWARD] > 4 * found.activations[0] / 3


def test_later_micro_batches_find_the_gradients_of_those_before_them(graph):
    assert held(graph, "dp=4,micro=2").gradients[FORWARD] == about(held(graph, "dp=4").parameters)


def test_casts_of_parameters_are_buffers(graph):
    found, plain = (held(graph, text) for text in ("dp=4,precision=bf16", "dp=4"))
    assert plain.parameters / 3 < buffers(found, FORWARD) < plain.parameters / 2  # all but the embedding
    assert found.activations[FORWARD] < plain.activations[FORWARD]


def test_what_is_gathered_of_spread_states_is_a_buffer(graph):
    found, plain = (held(graph, text) for text in ("dp=4,distribute_param=true", "dp=4"))
    assert buffers(found, FORWARD) == pytest.approx(plain.parameters, rel=0.1)
    assert found.activations[FORWARD] == pytest.approx(plain.activations[FORWARD], rel=0.05)
