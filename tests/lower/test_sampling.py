"""What a few layers tell about a deep step is what the whole of it does, and what it holds."""

from __future__ import annotations

import pytest

from moai.graph.step_graph import StepGraph
from moai.lower import lower
from moai.lower.sampling import few_layers, observe
from moai.plan.parse import parse
from moai.plan.work import Sample, Work
from tests.capture.conftest import capture, on_the_host, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import VOCABULARY, capturing, llama_with_adamw

WIDE = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": VOCABULARY, "max_position_embeddings": 32}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_hidden_layers": 10}
PLANS = [
    "dp=4",
    "dp=2,tp=2",
    "dp=4,micro=2",
    "dp=4,recompute=default",
    "dp=4,recompute=full,precision=bf16",
    "dp=4,distribute_param=true",
    "dp=4,micro=2,distribute_param=true,distribute_low_prec_param=true",
    "dp=2,tp=2,micro=2,recompute=full,distribute_param=true,distribute_low_prec_param=true,precision=bf16",
]


@pytest.fixture
def graph(capture, monkeypatch) -> StepGraph:  # noqa: F811
    return capturing(capture, monkeypatch)(llama_with_adamw(8, 32, **WIDE, **HEADS)).graph


def flops(work: Work) -> float:
    return float(work.flops.sum())


def of_all_layers(sample: Sample) -> tuple[float, float]:
    """Operations and the most bytes held."""
    less, more = sample.less, sample.more
    extrapolated = flops(less) + sample.deeper * (flops(more) - flops(less))
    return extrapolated, less.memory.total + sample.deeper * (more.memory.total - less.memory.total)


def test_few_layers_tell_what_all_compute_and_hold_no_less_than_they_do(graph, monkeypatch):
    # A layer's gradients fill messages, as those of large layers do.
    for limit in ("_MAX_BYTES", "_MIN_BYTES", "WHOLE_BYTES"):
        monkeypatch.setattr(f"moai.lower.buckets.{limit}", 1 << 17)
    for text in PLANS:
        plan = parse(text, 4)
        few = observe(graph, plan).sample()
        with monkeypatch.context() as patch:
            patch.setattr("moai.lower.sampling.with_units", lambda *_: None)
            whole = observe(graph, plan).sample()
        assert few.deeper > 0 and whole.deeper == 0
        operations, held = of_all_layers(few)
        assert operations == pytest.approx(flops(whole.less), rel=1e-9), text
        assert 0.999 <= held / whole.less.memory.total <= 1.04, text


def test_every_instructions_time_is_a_part_of_a_tasks(graph):
    few = few_layers(graph, parse("dp=4,micro=2", 4))
    code = few.program.instructions
    assert len(few.at) == len(code) and set(few.at) == {*range(len(few.tasks)), None}
    starts = {each.outs: few.at[i] for i, each in enumerate(code) if each.op.endswith("_start")}
    waits = {each.args[0].id: few.at[i] for i, each in enumerate(code) if each.op == "wait"}
    assert starts and waits == starts
    views = [i for i, each in enumerate(code) if each.op == "aten.permute.default"]
    assert views and all(few.at[i] == few.at[i + 1] for i in views)


def test_states_that_the_first_step_makes_take_no_time_of_later_ones(graph):
    few = few_layers(graph, parse("dp=4", 4))
    states = {slot.id for slot in few.program.outputs if slot.replaces is None}
    code = few.program.instructions
    made = [few.at[i] for i, each in enumerate(code) if each.op == "aten.full.default" and each.outs in states]
    assert made and set(made) == {None}


# Layers of a model of which few have as many gradients as are worth a message, and what is held by all of them.
NARROW = {
    "one message of all layers": ({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 10}, 0),
    "several layers in a message": ({"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 9}, 1 << 21),
}
NARROW_PLANS = [
    "dp=4",
    "dp=2,tp=2",
    "dp=4,precision=bf16,recompute=full",
    "dp=4,micro=2,distribute_param=true,distribute_low_prec_param=true",
]


@on_the_host
@pytest.mark.parametrize("case", NARROW)
def test_what_is_predicted_for_narrow_layers_is_what_the_program_of_all_holds(case, capture, monkeypatch):  # noqa: F811
    sizes, whole_bytes = NARROW[case]
    if whole_bytes:
        monkeypatch.setattr("moai.lower.buckets.WHOLE_BYTES", whole_bytes)
        monkeypatch.setattr("moai.lower.depth.steps.WHOLE_BYTES", whole_bytes)
    script = llama_with_adamw(8, 32, times=2, **{**WIDE, **HEADS, **sizes})
    graph = capturing(capture, monkeypatch)(script).graph
    for text in NARROW_PLANS:
        plan = parse(text, 4)
        sample = observe(graph, plan).sample()
        found = of_all_layers(sample)[1] / lower(graph, plan, [None] * len(graph.inputs)).peak_bytes
        assert sample.deeper > 0 and 0.97 <= found <= 1.05, (text, found)
