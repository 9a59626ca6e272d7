"""Recomputation: the backward reads what is computed again; not a bit of the results changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby

import pytest
import torch
from torch import nn

from moai.graph.step_graph import Input, Node, Origin, Phase, Ref, TensorType, flat_ids, refs
from moai.lower.recompute import recomputed
from moai.plan.plan import Recompute
from tests.capture.conftest import capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import LAYERS, SCRIPTS, capturing, computed_again, llama, train

aten = torch.ops.aten
moai = torch.ops.moai

EXPENSIVE = {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.convolution.default, moai.sdpa.default}


@pytest.fixture
def steps(capture, monkeypatch):  # noqa: F811
    return capturing(capture, monkeypatch)


# ---------------------------------------------------------------------- every level


@pytest.mark.parametrize("level", ["full", "default"])
@pytest.mark.parametrize("name", SCRIPTS)
def test_every_bit_of_the_results_stays(steps, name: str, level: Recompute) -> None:
    step = steps(name)
    nodes = step.recomputed(level)
    expected, _ = step.run(step.nodes)
    found, _ = step.run(nodes)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(
    ("name", "level", "at_most"),
    [
        ("llama", "full", 0.4),
        ("llama", "default", 0.7),
        ("one_layer", "full", 0.95),
        ("gpt2_with_dropout", "full", 0.5),
        ("gpt2_with_dropout", "default", 0.7),
        ("mixture_of_experts", "full", 0.5),
        ("mixture_of_experts", "default", 0.5),
        ("perceptron", "full", 0.6),
        ("pyramid", "full", 0.8),
        ("pyramid", "default", 0.8),
        ("accumulated", "full", 0.8),
        ("accumulated", "default", 0.8),
    ],
)
def test_the_peak_falls(steps, name: str, level: Recompute, at_most: float) -> None:
    step = steps(name)
    _, before = step.run(step.nodes)
    _, after = step.run(step.recomputed(level))
    assert after <= at_most * before


def test_none_changes_nothing(steps) -> None:
    step = steps("llama")
    assert step.recomputed("none") == step.nodes


@pytest.mark.parametrize("level", ["full", "default"])
def test_a_step_without_a_backward_stays_as_it_is(steps, level: Recompute) -> None:
    step = steps("llama")
    forward = [n for n in step.nodes if n.origin.phase == "forward"]
    last = flat_ids(forward[-1].outs)[0]
    types = list(step.graph.types)
    assert recomputed(forward, types, step.graph.inputs, [last], level) == (forward, types)


@pytest.mark.parametrize("level", ["full", "default"])
def test_copies_belong_to_the_backward_and_to_the_same_line(steps, level: Recompute) -> None:
    step = steps("llama")
    lines = {n.origin for n in step.nodes}
    copies = computed_again(step, step.recomputed(level))
    assert copies and all(n.origin.phase == "backward" for n in copies)
    assert {replace(n.origin, phase="forward") for n in copies} <= lines


@pytest.mark.parametrize("level", ["full", "default"])
def test_dropout_draws_from_its_stream_again(steps, level: Recompute) -> None:
    step = steps("gpt2_with_dropout")
    drawn = [n.args for n in step.nodes if n.op is moai.random.default]
    again = [n.args for n in computed_again(step, step.recomputed(level)) if n.op is moai.random.default]
    assert again and all(args in drawn for args in again)


# ---------------------------------------------------------------------- full


def test_full_computes_one_layer_at_a_time_from_the_last_to_the_first(steps) -> None:
    step = steps("llama")
    attention = [n.op for n in step.recomputed("full") if n.origin.phase == "backward" and "sdpa" in n.op._schema.name]
    assert attention == [moai.sdpa.default, moai.sdpa_backward.default] * LAYERS


def test_full_computes_a_layer_again_in_one_piece(steps) -> None:
    step = steps("gpt2_with_dropout")
    nodes = step.recomputed("full")
    again = {id(n) for n in computed_again(step, nodes)}
    pieces = [new for new, _ in groupby(id(n) in again for n in nodes)].count(True)
    assert pieces == 4 + 1  # layers, and what comes before them


def test_full_keeps_of_a_layer_only_its_input(steps) -> None:
    step = steps("llama")
    deeper = steps(llama(LAYERS + 2))
    per_layer = (deeper.saved(deeper.recomputed("full")) - step.saved(step.recomputed("full"))) / 2
    assert per_layer == 8 * 32 * 32 * 4  # batch, positions, hidden size, bytes


def test_full_does_not_compute_again_what_nobody_reads(steps) -> None:
    """The last product of a layer, and the head behind the layers."""
    step = steps("llama")
    again = Counter(n.op for n in computed_again(step, step.recomputed("full")))
    assert again[aten.mm.default] == 6 * LAYERS  # query, key, value, output, gate, up


def test_full_leaves_a_model_alone_that_the_script_checkpoints(steps) -> None:
    def script(device: str) -> None:
        blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 32)) for _ in range(4))
        blocks.to(device)
        x = torch.randn(64, 32).to(device)

        def loss() -> torch.Tensor:
            h = x
            for block in blocks:
                h = h + torch.utils.checkpoint.checkpoint(block, h, use_reentrant=False)
            return h.square().mean()

        train(blocks, loss)

    step = steps(script)
    assert not [n for n in computed_again(step, step.recomputed("full")) if n.op in EXPENSIVE]


# ---------------------------------------------------------------------- default


@pytest.mark.parametrize("name", SCRIPTS)
def test_default_computes_nothing_expensive_again(steps, name: str) -> None:
    step = steps(name)
    assert not [n for n in computed_again(step, step.recomputed("default")) if n.op in EXPENSIVE]


def test_default_computes_norms_and_activations_again(steps) -> None:
    step = steps("llama")
    again = {n.op for n in computed_again(step, step.recomputed("default"))}
    assert {aten.rsqrt.default, aten.silu.default, aten.mul.Tensor} <= again


def test_a_budget_is_kept_with_the_fewest_copies(steps) -> None:
    step = steps("llama")
    everything, least = step.saved(step.nodes), step.saved(step.recomputed("default"))
    counts = []
    for part in (0.0, 0.25, 0.5, 0.75, 1.0):
        budget = int(least + part * (everything - least))
        nodes = step.recomputed("default", budget)
        assert step.saved(nodes) <= budget
        counts.append(len(computed_again(step, nodes)))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[2] > counts[-1] == 0


def test_a_budget_that_is_too_small_gives_up_all_that_is_cheap(steps) -> None:
    step = steps("llama")
    assert step.recomputed("default", budget=0) == step.recomputed("default")


# ---------------------------------------------------------------------- single nodes

F32 = torch.float32


class Graph:
    """A graph written by hand: `x` is the batch, `w` a weight, both [64, 64]."""

    def __init__(self) -> None:
        self.types: list[TensorType] = []
        self.nodes: list[Node] = []
        self.x, self.w = self._value(F32), self._value(F32)
        self.inputs = [Input(self.x.id, batch=True, dies=True), Input(self.w.id, batch=False, dies=False)]

    def _value(self, dtype: torch.dtype) -> Ref:
        self.types.append(TensorType((64, 64), dtype))
        return Ref(len(self.types) - 1)

    def add(self, phase: Phase, op: torch._ops.OpOverload, *args, dtype: torch.dtype = F32, **kwargs) -> Ref:
        out = self._value(dtype)
        self.nodes.append(Node(op, args, kwargs, out.id, Origin(phase)))
        return out

    def copied(self, outputs: Sequence[Ref], level: Recompute = "default", budget: int | None = None) -> list[Node]:
        nodes, _ = recomputed(self.nodes, self.types, self.inputs, [o.id for o in outputs], level, budget)
        return [n for n in nodes if n.outs >= len(self.types)]


def test_what_the_optimizer_reads_too_is_made_once() -> None:
    graph = Graph()
    h = graph.add("forward", aten.tanh.default, graph.x)
    y = graph.add("forward", aten.mm.default, h, graph.w)
    grad = graph.add("backward", aten.mm.default, h, y)
    new = graph.add("optimizer", aten.add.Tensor, grad, h)
    assert graph.copied([new]) == []


def test_what_the_step_puts_out_is_made_once() -> None:
    graph = Graph()
    h = graph.add("forward", aten.tanh.default, graph.x)
    y = graph.add("forward", aten.mm.default, h, graph.w)
    grad = graph.add("backward", aten.mm.default, h, y)
    assert [n.op for n in graph.copied([grad])] == [aten.tanh.default]
    assert graph.copied([grad, h]) == []


def test_weights_in_another_dtype_are_made_once() -> None:
    graph = Graph()
    w = graph.add("forward", aten._to_copy.default, graph.w, dtype=torch.bfloat16)
    x = graph.add("forward", aten._to_copy.default, graph.x, dtype=torch.bfloat16)
    y = graph.add("forward", aten.mm.default, x, w, dtype=torch.bfloat16)
    z = graph.add("forward", aten.mm.default, y, w, dtype=torch.bfloat16)
    grad = graph.add("backward", aten.mm.default, z, w, dtype=torch.bfloat16)
    grad = graph.add("backward", aten.mm.default, x, grad, dtype=torch.bfloat16)
    assert [n.args for n in graph.copied([grad])] == [(graph.x,)]


@pytest.mark.parametrize("level", ["full", "default"])
def test_a_random_operator_without_a_seed_of_its_own_is_not_run_again(level: Recompute) -> None:
    graph = Graph()
    masks, h = [], graph.x
    for _ in range(12):
        masks.append(graph.add("forward", aten.bernoulli.p, h, 0.5))
        h = graph.add("forward", aten.tanh.default, graph.add("forward", aten.mul.Tensor, h, masks[-1]))
        masks.append(h)
    for saved in reversed(masks):
        h = graph.add("backward", aten.mul.Tensor, h, saved)
    copies = graph.copied([h], level)
    assert copies and all(n.op is not aten.bernoulli.p for n in copies)


def test_layers_are_cut_where_least_crosses_though_they_seem_to_begin_elsewhere() -> None:
    """What comes before the first layer looks like the end of a layer."""
    graph = Graph()

    def residual(h: Ref, through: Ref) -> Ref:
        product = graph.add("forward", aten.mm.default, through, graph.w)
        return graph.add("forward", aten.add.Tensor, h, graph.add("forward", aten.tanh.default, product))

    made, h = [], residual(graph.x, graph.x)
    for _ in range(6):
        inner = graph.add("forward", aten.cos.default, graph.add("forward", aten.sin.default, h))
        made += [Ref(inner.id - 1), inner]
        h = residual(h, inner)
        made += [Ref(h.id - 2), Ref(h.id - 1)]
    for value in reversed(made):
        h = graph.add("backward", aten.mul.Tensor, h, value)
    copies = [n.op for n in graph.copied([h], "full")]
    layer = [aten.sin.default, aten.cos.default, aten.mm.default, aten.tanh.default]
    assert copies == layer * (len(copies) // 4) and len(copies) >= 20


def test_a_narrow_source_is_kept_for_several_wide_values_made_of_it() -> None:
    graph = Graph()
    product = graph.add("forward", aten.mm.default, graph.x, graph.w, dtype=torch.bfloat16)
    wide = graph.add("forward", aten._to_copy.default, product)
    squared = graph.add("forward", aten.mul.Tensor, wide, wide)
    y = graph.add("forward", aten.mm.default, squared, graph.w)
    grad = graph.add("backward", aten.mm.default, squared, y)
    grad = graph.add("backward", aten.mul.Tensor, grad, wide)
    copies = graph.copied([grad])
    assert [n.op for n in copies] == [aten._to_copy.default, aten.mul.Tensor]
    assert copies[0].args == (product,)


def test_a_value_whose_sources_would_cost_as_much_is_kept() -> None:
    graph = Graph()
    product = graph.add("forward", aten.mm.default, graph.x, graph.w)
    h = graph.add("forward", aten.tanh.default, product)
    y = graph.add("forward", aten.mm.default, h, graph.w)
    grad = graph.add("backward", aten.mm.default, h, y)
    assert graph.copied([grad]) == []


def test_under_a_budget_what_saves_most_for_the_work_goes_first() -> None:
    graph = Graph()
    chain = graph.add("forward", aten.sin.default, graph.x)
    for _ in range(3):
        chain = graph.add("forward", aten.cos.default, chain)
    short = graph.add("forward", aten.tanh.default, graph.x)
    y = graph.add("forward", aten.mm.default, chain, short)
    grad = graph.add("backward", aten.mm.default, chain, y)
    grad = graph.add("backward", aten.mm.default, short, grad)
    one_value = 64 * 64 * 4
    assert [n.op for n in graph.copied([grad], budget=2 * one_value)] == [aten.tanh.default]


def test_copies_stand_right_before_their_first_use() -> None:
    graph = Graph()
    h = graph.add("forward", aten.tanh.default, graph.x)
    y = graph.add("forward", aten.mm.default, h, graph.w)
    other = graph.add("backward", aten.neg.default, y)
    grad = graph.add("backward", aten.mm.default, h, other)
    last = graph.add("backward", aten.mul.Tensor, grad, h)
    nodes, _ = recomputed(graph.nodes, graph.types, graph.inputs, [last.id], "default")
    backward = [n for n in nodes if n.origin.phase == "backward"]
    assert [n.op for n in backward] == [aten.neg.default, aten.tanh.default, aten.mm.default, aten.mul.Tensor]
    copy = backward[1].outs
    assert [copy in {r.id for r in refs(n.args)} for n in backward[2:]] == [True, True]
