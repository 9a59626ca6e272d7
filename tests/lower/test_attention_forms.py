"""Attention in the ways in which scripts write it: each device has its share of the heads, whatever the way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from moai.graph.placement import REPLICATE
from moai.lower import Program, lower
from moai.plan.plan import Plan
from tests.capture.conftest import capture, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import Step, capturing, sizes, train
from tests.lower.lockstep import run
from tests.lower.test_tensor_parallel import exchanged

BATCH, LENGTH, HEADS, HEAD, VOCABULARY = 4, 6, 4, 4, 32
WIDTH = HEADS * HEAD

Tensor = torch.Tensor
Projected = tuple[Tensor, Tensor, Tensor]  # query, key, value [B, H, S, E]


# -- how query, key and value are made


class Separate(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Projected:
        q, k, v = (m(x).view(*x.shape[:2], HEADS, HEAD).transpose(1, 2) for m in (self.query, self.key, self.value))
        return q, k, v


class Fused(nn.Module):
    def __init__(self, apart: Callable[[Tensor], Projected]) -> None:
        super().__init__()
        self.fused, self.apart = nn.Linear(WIDTH, 3 * WIDTH), apart

    def forward(self, x: Tensor) -> Projected:
        return self.apart(self.fused(x))


def split(y: Tensor) -> Projected:
    q, k, v = (t.view(*y.shape[:2], HEADS, HEAD).transpose(1, 2) for t in y.split(WIDTH, dim=2))
    return q, k, v


def unbound(y: Tensor) -> Projected:
    q, k, v = y.reshape(*y.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def indexed(y: Tensor) -> Projected:
    y = y.view(*y.shape[:2], 3, HEADS, HEAD).permute(2, 0, 3, 1, 4)
    return y[0], y[1], y[2]


def chunked(y: Tensor) -> Projected:
    q, k, v = (t.squeeze(2).transpose(1, 2) for t in y.view(*y.shape[:2], 3, HEADS, HEAD).chunk(3, 2))
    return q, k, v


def heads_first(y: Tensor) -> Projected:
    q, k, v = y.view(*y.shape[:2], HEADS, 3 * HEAD).transpose(1, 2).chunk(3, -1)
    return q, k, v


# -- how they are mixed


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril()
    scores = (q @ k.transpose(-2, -1)) * HEAD**-0.5
    return scores.masked_fill(mask == 0, float("-inf")).softmax(-1) @ v


def with_dropout(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.dropout((q @ k.transpose(-2, -1)).softmax(-1), 0.3) @ v


def by_einsum(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhsd,bhtd->bhst", q, k).tanh()  # capped
    return torch.einsum("bhst,bhtd->bhsd", scores.softmax(-1), v)


def flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """[B*H, S, E], as torch.bmm wants it; the mask is added to [B, H, S, S]."""
    b, h, s, _ = q.shape
    first, second, third = (t.contiguous().view(b * h, s, HEAD) for t in (q, k, v))
    scores = torch.bmm(first * 0.5, second.transpose(1, 2)).view(b, h, s, s)
    scores = scores + torch.full((s, s), float("-inf"), device=q.device).triu(1)[None, None]
    return torch.bmm(F.softmax(scores.view(b * h, s, s), dim=-1), third).view(b, h, s, HEAD)


def with_biased_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch.baddbmm with a bias for every head."""
    b, h, s, _ = q.shape
    slopes = torch.arange(1, h + 1, device=q.device, dtype=q.dtype).view(1, h, 1, 1)
    bias = (slopes * torch.arange(s, device=q.device)).expand(b, h, 1, s).reshape(b * h, 1, s)
    scores = bias.baddbmm(q.reshape(b * h, s, HEAD), k.reshape(b * h, s, HEAD).mT, beta=0.5, alpha=0.3)
    return torch.bmm(scores.softmax(-1), v.reshape(b * h, s, HEAD)).view(b, h, s, HEAD)


class Attention(nn.Module):
    def __init__(self, projections: nn.Module, mix: Callable[..., Tensor]) -> None:
        super().__init__()
        self.projections, self.mix, self.out = projections, mix, nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(*self.projections(x)).transpose(1, 2).reshape(x.shape))


class OfPyTorch(nn.Module):
    def __init__(self, weights: bool) -> None:
        super().__init__()
        self.attention, self.weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), weights

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.full((x.shape[1],) * 2, float("-inf"), device=x.device, dtype=x.dtype).triu(1)
        return self.attention(x, x, x, need_weights=self.weights, attn_mask=mask)[0]


FORMS: dict[str, Callable[[], nn.Module]] = {
    "split, eager": lambda: Attention(Fused(split), eager),
    "separate, einsum": lambda: Attention(Separate(), by_einsum),
    "separate, flattened": lambda: Attention(Separate(), flattened),
    "separate, biased": lambda: Attention(Separate(), with_biased_product),
    "separate, dropout": lambda: Attention(Separate(), with_dropout),
    "unbound, sdpa": lambda: Attention(Fused(unbound), sdpa),
    "unbound, flattened": lambda: Attention(Fused(unbound), flattened),
    "indexed, sdpa": lambda: Attention(Fused(indexed), sdpa),
    "chunked, sdpa": lambda: Attention(Fused(chunked), sdpa),
    "heads first, eager": lambda: Attention(Fused(heads_first), eager),
    "PyTorch's": lambda: OfPyTorch(weights=False),
    "PyTorch's with weights": lambda: OfPyTorch(weights=True),
}
PLANS = [Plan(tp=2), Plan(dp=2, tp=4), Plan(dp=2, tp=2, micro=2)]


# -- a model of them


class Layer(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.norm, self.norm_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.up, self.down = attention, nn.Linear(WIDTH, 40), nn.Linear(40, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def model_of(form: str, layers: int) -> nn.Module:
    torch.manual_seed(0)
    blocks = (Layer(FORMS[form]()) for _ in range(layers))
    return nn.Sequential(nn.Embedding(VOCABULARY, WIDTH), *blocks, nn.Linear(WIDTH, VOCABULARY, bias=False)).double()


def script(form: str, layers: int) -> Callable[[str], None]:
    def of_the_user(device: str) -> None:
        model = model_of(form, layers).to(device)
        tokens = torch.randint(0, VOCABULARY, (BATCH, LENGTH)).to(device)
        train(model, lambda: F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten()))

    return of_the_user


@pytest.fixture
def steps(capture, monkeypatch):  # noqa: F811
    return capturing(capture, monkeypatch)


def program_of(step: Step, plan: Plan) -> Program:
    return lower(step.graph, plan, [None] * len(step.graph.inputs))


def assert_exact(step: Step, program: Program, tolerance: float) -> None:
    inputs = [step.given[i.id] for i in step.graph.inputs]
    expected, _ = step.run(step.nodes)
    for a, b in zip(run(program, inputs, step.scalars), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def whole(program: Program) -> list[str]:
    """The matrices of numbers that every device has all of."""
    matrices = [s for s in program.inputs if len(s.type.shape) > 1 and s.type.dtype.is_floating_point]
    return [str(s.type) for s in matrices if s.placement == REPLICATE]


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_of_a_layer_is_split_and_the_numbers_are_one_devices(steps, form: str):
    step = steps(script(form, 1))
    for plan in PLANS:
        program = program_of(step, plan)
        assert whole(program) == []
        assert_exact(step, program, 1e-10)


@pytest.mark.parametrize("form", FORMS)
def test_a_layer_costs_two_sums_forward_and_two_backward(steps, form: str):
    one, two = (steps(script(form, n)) for n in (1, 2))
    for plan in PLANS:
        more = exchanged(program_of(two, plan)) - exchanged(program_of(one, plan))
        assert more == Counter(reduce_scatter=4, all_gather=4), plan


def test_samples_that_are_not_the_first_dim_stay_on_their_devices(steps):
    """nn.MultiheadAttention flattens [S, B, E] to [S*B, E]."""
    program = program_of(steps(script("PyTorch's", 1)), Plan(dp=2))
    assert exchanged(program) == Counter()


def test_heads_that_are_fewer_than_the_devices_are_not_cut_in_their_width(steps):
    """All scores would have to be summed."""
    program = program_of(steps(script("separate, einsum", 1)), Plan(tp=8))
    assert whole(program) == [f"float64[{WIDTH},{WIDTH}]"] * 4


# -- models as they are


def small(kind: type[transformers.PretrainedConfig], **changes: object) -> transformers.PretrainedConfig:
    return kind(**{**sizes(1), "bos_token_id": None, "eos_token_id": None, "pad_token_id": None, **changes})


MODELS = {
    "llama": small(transformers.LlamaConfig),
    "gemma2, which caps its scores": small(transformers.Gemma2Config, head_dim=8),
    "gpt2, fused": small(transformers.GPT2Config, attn_pdrop=0.1, n_positions=32),
    "bloom, flattened": small(transformers.BloomConfig),
    "opt": small(transformers.OPTConfig, ffn_dim=80, word_embed_proj_dim=32),
}


def language_model(config: transformers.PretrainedConfig, dtype: torch.dtype) -> Callable[[str], None]:
    def of_the_user(device: str) -> None:
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model = model.to(dtype).train().to(device)
        tokens, mask = torch.randint(0, 128, (4, 8)), torch.ones(4, 8, dtype=torch.int64)
        tokens, mask = tokens.to(device), mask.to(device)
        train(model, lambda: model(tokens, attention_mask=mask, labels=tokens, use_cache=False).loss)

    return of_the_user


@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_eager_attention_is_split(steps, name: str):
    step = steps(language_model(MODELS[name], torch.float64))
    program = program_of(step, Plan(dp=2, tp=2))
    assert whole(program) == []
    assert_exact(step, program, 2e-6)  # softmax in fp32


def test_experts_are_split_in_their_width(steps):
    config = small(transformers.MixtralConfig, num_local_experts=4)
    step = steps(language_model(config, torch.float32))
    program = program_of(step, Plan(tp=2))
    assert whole(program) == ["float32[4,32]"], "the router's"
    assert_exact(step, program, 2e-4)
