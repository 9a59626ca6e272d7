"""Tensor parallelism: which dims are split is found from the graph, and what it costs in messages is the least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers

from moai.graph.placement import REPLICATE
from moai.lower import Program, lower
from moai.plan.errors import PlanError
from moai.plan.plan import Plan
from tests.capture.conftest import capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import Step, capturing, language_model, sizes, train
from tests.lower.lockstep import run
from tests.lower.sections import messages
from tests.lower.step_tracing import phase, trace

moai = torch.ops.moai

Tensors = Sequence[torch.Tensor]
BATCH, LENGTH, WIDTH, HEAD, FORWARD = 4, 6, 16, 4, 24


# -- a transformer in plain PyTorch


def state_of(layers: int, heads: int = 4, key_heads: int = 4, vocabulary: int = 32, width: int = FORWARD) -> Tensors:
    """Tied embedding, then for each layer: norm, query, key, value, output, up, down."""
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(vocabulary, WIDTH)]
    for _ in range(layers):
        shapes += [(WIDTH,), (heads * HEAD, WIDTH), (key_heads * HEAD, WIDTH), (key_heads * HEAD, WIDTH)]
        shapes += [(WIDTH, heads * HEAD), (width, WIDTH), (WIDTH, width)]
    return [torch.randn(s, dtype=torch.float64) * 0.4 for s in shapes]


def loss_of(params: Tensors, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    embedding, *rest = params
    h = F.embedding(ids, embedding)
    for k in range(0, len(rest), 7):
        gain, query, key, value, out, up, down = rest[k : k + 7]
        normed = normalised(h, gain)
        q, k_, v = (F.linear(normed, w).view(BATCH, LENGTH, -1, HEAD).transpose(1, 2) for w in (query, key, value))
        mixed = Attention.apply(q, k_, v)
        h = h + F.linear(mixed.transpose(1, 2).reshape(BATCH, LENGTH, -1), out)
        h = h + F.linear(F.gelu(F.linear(normalised(h, gain), up)), down)
    return F.cross_entropy(F.linear(h, embedding).flatten(0, 1), targets.flatten())


class Attention(torch.autograd.Function):
    """As the accelerator records it: one node forward, one backward."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = moai.sdpa(q, k, v, None, True, None, q.shape[1] > k.shape[1])
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, lse = ctx.saved_tensors
        return moai.sdpa_backward(grad, q, k, v, out, lse, None, True, None, q.shape[1] > k.shape[1])


def normalised(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def step(*args):
    """One step of SGD with momentum: weights, momenta, tokens and targets."""
    n = (len(args) - 2) // 2
    params, momenta = args[:n], args[n:-2]
    inner = [p.detach().requires_grad_() for p in params]
    loss = loss_of(inner, *args[-2:])
    phase("backward")
    grads = torch.autograd.grad(loss, inner)
    phase("optimizer")
    for p, m, g in zip(params, momenta, grads, strict=True):
        m.mul_(0.9).add_(g)
        p.add_(m, alpha=-0.1)
    return (loss.detach(),)


def lowered(plan: Plan, state: Tensors) -> Program:
    """The program of a step; it has been seen to give one device's numbers."""
    vocabulary = state[0].shape[0]
    targets = torch.randint(0, vocabulary, (BATCH, LENGTH))
    targets[0] = -100
    tensors = [*state, *map(torch.zeros_like, state), torch.randint(0, vocabulary, (BATCH, LENGTH)), targets]
    program = lower(trace(step, tensors[:-2], tensors[-2:]), plan, [None] * len(tensors))
    plain = [t.clone() for t in tensors]
    expected = [*step(*plain), *plain[:-2]]
    for a, b in zip(run(program, tensors), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    return program


def exchanged(program: Program) -> Counter[str]:
    """How often activations are exchanged: what has samples and a sequence."""
    found: Counter[str] = Counter()
    for i in program.instructions:
        kind = i.op.removesuffix("_start")
        if kind in ("all_gather", "reduce_scatter") and i.op == kind:
            found[kind] += 1
        elif kind in ("all_gather", "reduce_scatter"):
            found[kind] += len(i.args[0])
    return found


def lies(program: Program, n: int) -> list[str]:
    return [str(s.placement) for s in program.inputs[:n]]


# -- where the weights are


def test_heads_are_split_then_the_feed_forward_width_then_the_vocabulary():
    program = lowered(Plan(tp=2), state_of(1))
    assert lies(program, 8) == ["S0(tp)", "R", "S0(tp)", "S0(tp)", "S0(tp)", "S1(tp)", "S0(tp)", "S1(tp)"]


def test_momenta_lie_as_their_weights_do():
    program = lowered(Plan(tp=2), state_of(1))
    assert lies(program, 16)[8:] == lies(program, 8)


def test_new_momenta_of_a_first_step_are_made_as_parts():
    def first_step(up, down, x):
        params = [p.detach().requires_grad_() for p in (up, down)]
        loss = F.linear(F.gelu(F.linear(x, params[0])), params[1]).square().mean()
        phase("backward")
        grads = torch.autograd.grad(loss, params)
        phase("optimizer")
        momenta = torch._foreach_mul([torch.zeros_like(p) for p in (up, down)], 0.9)
        momenta = torch._foreach_addcmul(momenta, grads, grads)
        for p, momentum in zip((up, down), momenta, strict=True):
            p.sub_(momentum)
        return tuple(momenta)

    graph = trace(first_step, [torch.randn(FORWARD, WIDTH), torch.randn(WIDTH, FORWARD)], [torch.randn(BATCH, WIDTH)])
    program = lower(graph, Plan(tp=2), [None] * 3)
    made = [i.shapes[0] for i in program.instructions if i.op == "aten.full.default" and i.args[0]]
    assert sorted(made) == [(FORWARD // 2, WIDTH), (WIDTH, FORWARD // 2)]


def test_whole_heads_stay_together():
    heads = lowered(Plan(tp=2), state_of(1, key_heads=2)).inputs[2].placement.shards[0]
    assert heads.sizes == (8, 8)


@pytest.mark.parametrize("tp", [2, 4])
def test_a_vocabulary_and_a_width_need_not_be_divisible(tp: int):
    program = lowered(Plan(tp=tp), state_of(1, vocabulary=97, width=37))
    expected = {2: ((49, 48), (19, 18)), 4: ((25, 24, 24, 24), (10, 9, 9, 9))}[tp]
    assert tuple(program.inputs[k].placement.shards[0].sizes for k in (0, 6)) == expected


@pytest.mark.parametrize("micro", [1, 2])
def test_a_mask_that_is_infinite_is_added_to_sums_and_not_to_their_terms(steps, micro: int):
    step: Step = steps("gpt2_with_dropout")
    inputs = [step.given[i.id].clone() for i in step.graph.inputs]
    program = lower(step.graph, Plan(tp=2, micro=micro), [None] * len(inputs))
    expected, _ = step.run(step.nodes)
    for found, value in zip(run(program, inputs, step.scalars), expected, strict=True):
        torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key_heads", [1, 2])
def test_with_fewer_key_heads_than_devices_keys_and_values_are_whole(key_heads: int):
    program = lowered(Plan(tp=4), state_of(2, key_heads=key_heads))
    assert lies(program, 6)[2:] == ["S0(tp)", "R", "R", "S1(tp)"]


# -- what is sent


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("key_heads", [4, 2])
def test_a_layer_costs_two_sums_forward_and_two_backward(tp: int, key_heads: int):
    """Each is scattered along the sequence, and gathered where the next product needs it."""
    one, two = (exchanged(lowered(Plan(tp=tp), state_of(n, key_heads=key_heads))) for n in (1, 2))
    assert two - one == Counter(reduce_scatter=4, all_gather=4)
    assert one == Counter(reduce_scatter=4 + 2, all_gather=4 + 2), "besides, the embedding's and the logits'"


def test_logits_are_never_gathered():
    program = lowered(Plan(tp=2), state_of(1, vocabulary=512))
    largest = BATCH * LENGTH * WIDTH
    sent = {id_ for _, _, id_ in messages(program.instructions)}
    shapes = {o: s for i in program.instructions for o, s in zip(_outs(i.outs), i.shapes, strict=False)}
    for id_ in sent & shapes.keys():
        numel = 1
        for length in shapes[id_]:
            numel *= length if isinstance(length, int) else max(length.values)
        assert numel <= largest, f"%{id_} {shapes[id_]} is sent"


def _outs(outs: object) -> tuple[int, ...]:
    return (outs,) if isinstance(outs, int) else tuple(o for o in outs or () if isinstance(o, int))


def test_losses_exchange_a_maximum_and_two_sums_a_token():
    program = lowered(Plan(tp=2), state_of(1))
    maxima = [i for i in program.instructions if i.op == "all_reduce" and i.args[2] == "max"]
    assert [i.shapes for i in maxima] == [((BATCH * LENGTH, 1),)]


# -- together with other plans


@pytest.mark.parametrize(
    "plan",
    [
        Plan(dp=2, tp=2),
        Plan(tp=2, micro=2),
        Plan(dp=2, tp=2, micro=2, distribute_param=True, distribute_low_prec_param=True),
        Plan(tp=2, recompute="full"),
        Plan(dp=2, tp=4),
    ],
    ids=str,
)
def test_tensor_parallelism_goes_with_every_other_plan(plan: Plan):
    state = state_of(1, key_heads=2, vocabulary=33)
    alone = lowered(Plan(tp=plan.tp), state)
    program = lowered(plan, state)
    over_tp = [[s for s in slot.placement.shards if s.axes == ("tp",)] for slot in program.inputs[:-2]]
    assert over_tp == [list(slot.placement.shards) for slot in alone.inputs[:-2]]


# -- what cannot be split


def test_a_model_without_products_is_left_alone():
    w, x = torch.randn(64, 4), torch.randint(0, 64, (4, 6))
    program = lower(trace(lambda w, x: (F.embedding(x, w).sum(),), [w], [x]), Plan(tp=2), [None, None])
    assert program.inputs[0].placement == REPLICATE


def test_what_passes_through_a_step_is_no_weight():
    """Activations that an earlier segment has left are not what is to be split."""

    def second_half(first, second, h):
        p, q, x = (t.detach().requires_grad_() for t in (first, second, h))
        loss = ((x @ p).relu() @ q).square().mean()
        phase("backward")
        grads = torch.autograd.grad(loss, [p, q, x])
        phase("optimizer")
        first.add_(grads[0], alpha=-0.1)
        second.add_(grads[1], alpha=-0.1)
        return loss.detach(), grads[2]

    tensors = [torch.randn(8, 16), torch.randn(16, 4), torch.randn(512, 8)]
    graph = trace(second_half, tensors[:2], tensors[2:])
    passing = replace(graph.inputs[2], batch=False, dies=True)
    program = lower(replace(graph, inputs=(*graph.inputs[:2], passing)), Plan(tp=2), [None] * 3)
    assert [str(s.placement) for s in program.inputs] == ["S1(tp)", "S0(tp)", "R"]


# -- models as they are


@pytest.fixture
def steps(capture, monkeypatch):  # noqa: F811
    return capturing(capture, monkeypatch)


def captured(step_: Step, plan: Plan) -> Program:
    """The program of a captured step; it has been seen to give one device's numbers, in single precision."""
    inputs = [step_.given[i.id] for i in step_.graph.inputs]
    program = lower(step_.graph, plan, [None] * len(inputs))
    expected, _ = step_.run(step_.nodes)
    for a, b in zip(run(program, inputs, step_.scalars), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-4, atol=2e-5)
    return program


def gpt2(layers: int, heads: int = 4) -> Callable[[str], None]:
    rates = {"resid_pdrop": 0.0, "attn_pdrop": 0.0, "embd_pdrop": 0.0}
    shape = {"n_embd": 32, "n_head": heads, "n_positions": 32, "vocab_size": 128}
    return language_model(transformers.GPT2Config(n_layer=layers, **shape, **rates))


def llama(layers: int, **changes: int) -> Callable[[str], None]:
    return language_model(transformers.LlamaConfig(**{**sizes(layers), **changes}))


@pytest.mark.parametrize("model", [llama, gpt2])
def test_a_layer_of_a_model_costs_two_sums_forward_and_two_backward(steps, model):
    one, two = (exchanged(captured(steps(model(n)), Plan(tp=2))) for n in (1, 2))
    assert two - one == Counter(reduce_scatter=4, all_gather=4)


def test_a_fused_query_key_value_weight_is_split_in_three_blocks(steps):
    program = captured(steps(gpt2(1)), Plan(tp=2))
    fused = [s for s in program.inputs if s.type.shape == (32, 96)]
    assert [str(s.placement) for s in fused] == ["S1x3(tp)"]


@pytest.mark.parametrize("key_heads", [1, 2])
def test_a_model_with_fewer_key_heads_than_devices(steps, key_heads: int):
    program = captured(steps(llama(1, num_key_value_heads=key_heads)), Plan(tp=4))
    keys = [s for s in program.inputs if s.type.shape == (8 * key_heads, 32) and s.type.dtype.is_floating_point]
    assert len(keys) == 2 and all(s.placement == REPLICATE for s in keys)


def test_gradients_of_repeated_key_heads_are_summed_in_fp32_where_attention_is_in_bf16(steps):
    def script(device: str) -> None:  # with a mask of the script's own, transformers repeats the key heads itself
        torch.manual_seed(0)
        config = transformers.LlamaConfig(**sizes(1), attn_implementation="sdpa")
        model = transformers.AutoModelForCausalLM.from_config(config).train().to(device)
        tokens, mask = torch.zeros(2, 8, dtype=torch.int64), torch.ones(2, 8, dtype=torch.int64)
        mask[0, :3] = 0
        tokens, mask = tokens.to(device), mask.to(device)
        train(model, lambda: model(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss)

    graph = steps(script).graph
    program = lower(graph, Plan(tp=4, precision="bf16"), [None] * len(graph.inputs))
    makers = {i.outs: i for i in program.instructions}
    sums = [i for i in program.instructions if i.op == "moai.sum_heads.default"]
    assert sums and all(makers[i.args[0].id].kwargs == {"dtype": torch.float32} for i in sums)


def test_heads_that_the_devices_do_not_divide_are_refused_with_the_nearest_plan(steps):
    graph = steps(llama(1)).graph
    with pytest.raises(PlanError, match="tp=3 does not divide the 4 attention heads") as refused:
        lower(graph, Plan(tp=3), [None] * len(graph.inputs))
    assert "dp=3" in str(refused.value)
