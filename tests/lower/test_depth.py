"""A deep model's program, written from that of a few of its layers, is what all of its layers are lowered to."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from moai.graph.step_graph import Ref, StepGraph, flat_ids, map_args
from moai.lower import Program, lower, lowering
from moai.lower.depth.pattern import Pattern, Strip, entries, runs
from moai.lower.depth.steps import shallow
from moai.lower.repeats import apart
from moai.plan.parse import parse
from moai.plan.plan import Plan
from tests.capture.conftest import capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import VOCABULARY, capturing, train

LAYERS = 14
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
}
# Large enough that what is gathered of one layer is not joined with the next, and that what is computed again is not
# taken for a repetition.
WIDE = transformers.LlamaConfig(**{**COMMON, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32})
GPT2 = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 32, "vocab_size": VOCABULARY}
OPT = {**COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32}
NARROW = {**COMMON, "intermediate_size": 32}
ALTERNATING = {**NARROW, "num_hidden_layers": 2 * LAYERS, "sliding_window": 8}  # of two kinds of layers, in turn
CONFIGS: dict[str, transformers.PretrainedConfig] = {
    "llama": transformers.LlamaConfig(**COMMON),
    "qwen2": transformers.Qwen2Config(**COMMON, tie_word_embeddings=True),
    "qwen3": transformers.Qwen3Config(**COMMON),
    "mistral": transformers.MistralConfig(**COMMON, sliding_window=8),
    "gemma2": transformers.Gemma2Config(**ALTERNATING),
    "gpt2": transformers.GPT2Config(**GPT2),  # which draws random numbers in every layer
    "opt": transformers.OPTConfig(**OPT),
    "mixtral": transformers.MixtralConfig(**NARROW, num_local_experts=2),
}
KINDS = [
    "dp=4",
    "dp=2,tp=2",
    "dp=4,micro=2",
    "dp=4,recompute=full",
    "dp=4,precision=bf16",
    "dp=4,distribute_param=true",
    "dp=4,distribute_param=true,distribute_low_prec_param=true",
]
EVERYTHING = "dp=2,tp=2,micro=2,recompute=full,distribute_param=true,distribute_low_prec_param=true,precision=bf16"


_scripts: dict[tuple[Any, ...], Callable[[str], None]] = {}  # kept: the same script is captured once


def training(
    config: transformers.PretrainedConfig, steps: int = 1, padded: bool = False, **options: Any
) -> Callable[[str], None]:
    key = (id(config), steps, padded, *options.items())
    if key in _scripts:
        return _scripts[key]

    def script(device: str) -> None:
        config._attn_implementation = "eager" if config.model_type == "gemma2" else "sdpa"
        config._experts_implementation = "batched_mm"
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).train().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), **options)
        tokens = torch.randint(0, VOCABULARY, (8, 16))
        mask = (torch.arange(16) < torch.arange(9, 17)[:, None]).long() if padded else torch.ones_like(tokens)
        tokens, mask = tokens.to(device), mask.to(device)
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            loss.item()

    return _scripts.setdefault(key, script)


@pytest.fixture
def graph_of(capture, monkeypatch) -> Callable[[Callable[[str], None]], StepGraph]:  # noqa: F811
    find = capturing(capture, monkeypatch)
    return lambda script: find(script).graph


def lowered_whole(graph: StepGraph, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Program:
    with monkeypatch.context() as patch:
        patch.setattr("moai.lower.lowering.shallow", lambda *_: ())
        return lower(graph, plan, [None] * len(graph.inputs))


def canonical(program: Program) -> Program:
    """The program with values named in the order in which they are made."""
    ids: dict[int, int] = {s.id: at for at, s in enumerate(program.inputs)}

    def renamed(leaf: Any) -> Any:
        return Ref(ids[leaf.id]) if isinstance(leaf, Ref) else leaf

    def outs(own: Any) -> Any:
        return ids[own] if isinstance(own, int) else None if own is None else tuple(map(outs, own))

    code = []
    for i in program.instructions:
        ids.update((out, len(ids)) for out in flat_ids(i.outs))
        args, kwargs = map_args(i.args, renamed), map_args(i.kwargs, renamed)
        frees = tuple(ids[k] for k in i.frees)
        code.append(replace(i, args=args, kwargs=kwargs, outs=outs(i.outs), frees=frees, where=""))
    inputs, outputs = (tuple(replace(s, id=ids[s.id]) for s in slots) for slots in (program.inputs, program.outputs))
    return replace(program, name="", inputs=inputs, outputs=outputs, instructions=tuple(code))


def same(a: Program, b: Program) -> None:
    a, b = canonical(a), canonical(b)
    for mine, its in zip(a.instructions, b.instructions, strict=False):
        assert mine == its
    assert a == b


def lowered_in_part(graph: StepGraph, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> Program:
    """The program, for which a few layers were lowered and nothing else."""
    whole, sizes = lowering.lowered, []

    def spy(few: StepGraph, *rest: Any) -> Any:
        sizes.append(len(few.nodes))
        return whole(few, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(lowering, "lowered", spy)
        program = lower(graph, plan, [None] * len(graph.inputs))
    assert max(sizes) < 0.75 * len(graph.nodes)
    return program


# ---------------------------------------------------------------------- the same program


@pytest.mark.parametrize("text", KINDS)
def test_every_kind_of_plan_is_lowered_alike(text: str, graph_of, monkeypatch) -> None:
    graph, plan = graph_of(training(CONFIGS["llama"])), parse(text, 4)
    same(lowered_in_part(graph, plan, monkeypatch), lowered_whole(graph, plan, monkeypatch))


def test_a_plan_of_everything_is_lowered_alike(graph_of, monkeypatch) -> None:
    """But for sums of single numbers behind the loop, which may find another message to go with."""
    graph, plan = graph_of(training(WIDE)), parse(EVERYTHING, 4)
    part, whole = (f(graph, plan, monkeypatch) for f in (lowered_in_part, lowered_whole))
    messages = {"wait", "all_reduce", "all_reduce_start"}
    counts = [Counter(i.op for i in program.instructions if i.op not in messages) for program in (part, whole)]
    assert counts[0] == counts[1]
    assert [s.placement for s in part.inputs] == [s.placement for s in whole.inputs]
    assert part.peak_bytes == whole.peak_bytes


def test_layers_whose_gradients_share_a_large_message_are_lowered_alike(graph_of, monkeypatch) -> None:
    """A message of five layers is small, one of all of them is not."""
    graph, plan = graph_of(training(WIDE)), parse("dp=4", 4)
    same(lowered_in_part(graph, plan, monkeypatch), lowered_whole(graph, plan, monkeypatch))


@pytest.mark.parametrize(
    "model",
    [
        m if m in ("qwen3", "gpt2", "mixtral") else pytest.param(m, marks=pytest.mark.slow)
        for m in sorted(CONFIGS.keys() - {"opt"})
    ],
)  # whose layer norms' many biases look alike
def test_every_model_is_lowered_alike(model: str, graph_of, monkeypatch) -> None:
    graph, plan = graph_of(training(CONFIGS[model], padded=True)), parse("dp=4", 4)
    same(lowered_in_part(graph, plan, monkeypatch), lowered_whole(graph, plan, monkeypatch))


def test_lists_that_would_grow_apart_are_noticed(graph_of, monkeypatch) -> None:
    graph = graph_of(training(CONFIGS["llama"]))
    plan = parse("dp=4,distribute_param=true,distribute_low_prec_param=true,shard=2", 4)
    same(lower(graph, plan, [None] * len(graph.inputs)), lowered_whole(graph, plan, monkeypatch))


@pytest.mark.parametrize(
    "model", [m if m in ("llama", "opt") else pytest.param(m, marks=pytest.mark.slow) for m in CONFIGS]
)
def test_where_it_is_not_clear_how_layers_go_on_all_of_them_are_lowered(model: str, graph_of, monkeypatch) -> None:
    graph, plan = graph_of(training(CONFIGS[model], padded=True)), parse("dp=2,tp=2,recompute=full", 4)
    same(lower(graph, plan, [None] * len(graph.inputs)), lowered_whole(graph, plan, monkeypatch))


@pytest.mark.parametrize("options", [{}, {"foreach": False}, {"fused": True}], ids=str)
def test_every_form_of_the_optimizer_is_lowered_alike(options: dict[str, bool], graph_of, monkeypatch) -> None:
    graph, plan = graph_of(training(CONFIGS["llama"], steps=2, **options)), parse("dp=4", 4)
    same(lowered_in_part(graph, plan, monkeypatch), lowered_whole(graph, plan, monkeypatch))


def test_what_a_step_of_few_layers_is_lowered_to_is_not_looked_at_for_more(graph_of, monkeypatch) -> None:
    graph = graph_of(training(transformers.LlamaConfig(**{**COMMON, "num_hidden_layers": 6})))
    assert not list(shallow(graph, [None] * len(graph.inputs), Plan(dp=4)))


def test_a_loop_that_has_nothing_to_do_with_layers_keeps_its_length(graph_of, monkeypatch) -> None:
    def script(device: str) -> None:
        torch.manual_seed(0)
        layers = nn.Sequential(*(m for _ in range(60) for m in (nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh())))
        model = layers.to(device)
        loss = model(torch.randn(8, 16).to(device)).square().mean()
        for _ in range(5):  # as many as the shallow step has layers
            loss = (loss * 0.5).sin() + loss
        train(model, lambda: loss)

    graph, plan = graph_of(script), Plan(dp=4)
    same(lowered_in_part(graph, plan, monkeypatch), lowered_whole(graph, plan, monkeypatch))


def test_layers_that_are_read_in_the_middle_are_lowered_one_by_one(graph_of, monkeypatch) -> None:
    def script(device: str) -> None:
        torch.manual_seed(0)
        layers = nn.ModuleList(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16), nn.Tanh()) for _ in range(30)).to(
            device
        )
        x = torch.randn(8, 16).to(device)
        kept = []
        for layer in layers:
            x = layer(x)
            kept.append(x)
        loss = x.square().mean() + kept[13].mean()
        train(layers, lambda: loss)

    graph, plan = graph_of(script), Plan(dp=4)
    same(lower(graph, plan, [None] * len(graph.inputs)), lowered_whole(graph, plan, monkeypatch))


# ---------------------------------------------------------------------- patterns


def two_runs(layers: int) -> list[Strip]:
    """Inputs: one for the first layer, and a weight for each. A layer uses what the one before made, and its weight;
    going back, it is used again, by what uses the weight. Numbers are those of inputs, then of what is made."""
    weights, going, back = range(1, layers + 1), layers + 1, 2 * layers + 1
    forward = [(going + k, going + k - 1 if k else 0, weights[k]) for k in range(layers)]
    backward = [(back + k, back + k - 1, going + layers - 1 - k, weights[-1 - k]) for k in range(layers)]
    made = range(going, going + 2 * layers + 1)
    return [
        Strip(["x", *"w" * layers], [(n,) for n in range(layers + 1)], (range(layers + 2),)),
        Strip([*"f" * layers, *"b" * layers], [*forward, *backward], (made,)),
    ]


def pattern_of(strips: Sequence[Strip]) -> Pattern:
    found = [runs(strip, 3) for strip in strips]
    pattern = Pattern.of(strips, found, {found[1][0]: 1})
    assert pattern is not None
    return pattern


@pytest.mark.parametrize("deeper", [-4, -1, 0, 1, 30])
def test_a_version_is_what_a_model_of_that_depth_has(deeper: int) -> None:
    pattern, wanted = pattern_of(two_runs(9)), two_runs(9 + deeper)
    assert pattern.is_clear()
    for found, strip in zip(pattern.version(deeper), wanted, strict=True):
        assert [tuple(numbers) for _, numbers in entries(found)] == [tuple(n) for n in strip.numbers]


def test_what_uses_a_layer_in_the_middle_makes_it_unclear() -> None:
    first, last = two_runs(9)
    middle = 9 + 1 + 4
    strip = Strip([*last.tokens, "loss"], [*last.numbers, (28, middle)], (range(10, 10 + 20),))
    assert not pattern_of([first, strip]).is_clear()


@pytest.mark.parametrize(
    ("tokens", "found"),
    [
        ("abcabcabc", [(0, 9, 3)]),
        ("xabababy", [(1, 7, 2)]),
        ("ababababxyzzxyzzxyzz", [(0, 8, 2), (8, 20, 4)]),
        ("abcd", []),
    ],
)
def test_stretches_that_repeat_are_found_with_their_shortest_period(tokens: str, found: list[tuple[int, ...]]) -> None:
    assert [(s.start, s.end, s.period) for s in apart(tokens, 3)] == found
