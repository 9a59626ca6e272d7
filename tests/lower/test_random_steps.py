"""Random training steps, by random plans, give one device's numbers (fp64, to 1e-9)."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F

from moai.lower import lower
from moai.plan.errors import PlanError
from moai.plan.plan import Plan
from tests.lower.lockstep import run
from tests.lower.step_tracing import phase, trace
from tests.lower.test_tensor_parallel import Attention

Tensor = torch.Tensor
Take = Callable[..., Tensor]  # (*shape) -> the next parameter
STEPS_A_SEED = 6


class Parameters:
    """Made when a model first asks for them; given again, in order, whenever it runs."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []
        self.given: list[Tensor] | None = None

    def __call__(self, *shape: int) -> Tensor:
        if self.given is not None:
            return self.given.pop(0)
        self.made.append(torch.randn(shape) / max(shape[-1], 1) ** 0.5)
        return self.made[-1]


# -- models: (parameters, random choices, batch) -> loss


def mlp(take: Take, r: random.Random, x: Tensor, y: Tensor) -> Tensor:
    h = x.float().double() if r.random() < 0.2 else x
    for _ in range(r.randint(1, 3)):
        width = r.choice([5, 8, 12])
        h = F.linear(h, take(width, h.shape[-1]), take(width) if r.random() < 0.5 else None)
        h = _normed(take, r, r.choice([F.relu, F.gelu, torch.tanh, F.silu])(h))
    return _loss(take, r, h, y)


def attention(take: Take, r: random.Random, ids: Tensor, y: Tensor) -> Tensor:
    heads, width, vocabulary = r.choice([2, 4, 6]), 12, 11
    key_heads = r.choice([k for k in (1, 2, heads) if heads % k == 0])
    table = take(vocabulary, width)
    h = F.embedding(ids, table, padding_idx=r.choice([None, 3]))
    b, s = ids.shape
    for _ in range(r.randint(1, 2)):
        x = _normed(take, r, h)
        parts = [heads * 4, key_heads * 4, key_heads * 4]
        if r.random() < 0.5 and key_heads == heads:
            fused = F.linear(x, take(sum(parts), width), take(sum(parts)))
            q, k, v = r.choice([_chunks, _fused_view, _fused_view_of_heads])(fused, heads)
        else:
            q, k, v = (F.linear(x, take(n, width)) for n in parts)
        q, k, v = (t.reshape(b, s, -1, 4).transpose(1, 2) for t in (q, k, v))
        mixed = r.choice([Attention.apply, _eager, _flattened])(q, k, v).transpose(1, 2).reshape(b, s, -1)
        h = h + F.linear(mixed, take(width, heads * 4), take(width) if r.random() < 0.3 else None)
        if r.random() < 0.6:
            h = h + F.linear(F.silu(F.linear(h, take(17, width))) * F.linear(h, take(17, width)), take(width, 17))
    if r.random() < 0.5:
        logits = F.linear(_normed(take, r, h), table)
        return F.cross_entropy(logits.flatten(0, 1), (y[:, None] + ids).flatten() % vocabulary, ignore_index=2)
    return _loss(take, r, h.mean(1), y)


def _chunks(fused: Tensor, heads: int) -> Sequence[Tensor]:
    return fused.chunk(3, -1)


def _fused_view(fused: Tensor, heads: int) -> Sequence[Tensor]:
    return fused.unflatten(-1, (3, heads, -1)).permute(2, 0, 1, 3, 4).unbind(0)


def _fused_view_of_heads(fused: Tensor, heads: int) -> Sequence[Tensor]:
    return fused.unflatten(-1, (heads, 3, -1)).unbind(3)


def _eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
    return ((q @ k.transpose(2, 3)) * 0.5).softmax(-1) @ v


def _flattened(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (t[:, :, None].expand(-1, -1, q.shape[1] // t.shape[1], -1, -1).reshape(q.shape) for t in (k, v))
    first, second, third = (t.reshape(-1, *t.shape[2:]) for t in (q, k, v))
    bias = first.new_full((q.shape[2],) * 2, -2.0).triu(1)[None]
    scores = torch.baddbmm(bias, first, second.transpose(1, 2), alpha=0.5).softmax(-1)
    return torch.bmm(scores, third).view(q.shape)


def images(take: Take, r: random.Random, x: Tensor, y: Tensor) -> Tensor:
    for _ in range(r.randint(1, 2)):
        channels = r.choice([4, 6])
        x = F.conv2d(x, take(channels, x.shape[1], 3, 3), take(channels), padding=1, stride=r.choice([1, 2]))
        kind = r.random()
        if kind < 0.4:
            x = F.group_norm(x, 2, take(channels), take(channels))
        elif kind < 0.7:
            x = F.batch_norm(x, None, None, take(channels), take(channels), training=True)
        x = F.relu(x)
    pooled = F.adaptive_avg_pool2d(x, 1) if r.random() < 0.5 else F.max_pool2d(x, 2).mean((2, 3), keepdim=True)
    return _loss(take, r, pooled.flatten(1), y)


def _normed(take: Take, r: random.Random, h: Tensor) -> Tensor:
    kind, width = r.random(), h.shape[-1]
    if kind < 0.3:
        return F.layer_norm(h, (width,), take(width), take(width))
    if kind < 0.5:
        return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * take(width)
    if kind < 0.6:
        return h * torch.ops.moai.random(h.shape, "bernoulli", 0.8, 0.0, 7, 0, h.dtype) / 0.8
    return h


def _loss(take: Take, r: random.Random, h: Tensor, y: Tensor) -> Tensor:
    kind = r.randrange(4)
    h = F.linear(h, take(5, h.shape[-1]))
    if kind == 0:
        return F.cross_entropy(h, y, ignore_index=1)
    if kind == 1:
        weight = torch.arange(1.0, 6.0, dtype=h.dtype)
        return F.cross_entropy(h, y, weight, label_smoothing=r.choice([0.0, 0.1]), reduction=r.choice(["mean", "sum"]))
    if kind == 2:
        return F.mse_loss(h, (y[:, None] == torch.arange(5)).to(h.dtype)) + 0.01 * h.sum(0).square().sum()
    a = F.normalize(h, dim=-1)
    return F.cross_entropy(a @ a.T, torch.arange(len(y)))


MODELS = {mlp: (7,), attention: (), images: (3, 6, 6)}


# -- steps


def _updated(kind: int, params: Sequence[Tensor], grads: Sequence[Tensor], states: Sequence[Tensor]) -> None:
    if kind == 0:
        torch._foreach_add_(params, grads, alpha=-0.1)
    elif kind == 1:
        for p, m, g in zip(params, states, grads, strict=True):
            m.mul_(0.9).add_(g)
            p.add_(m, alpha=-0.1)
    else:
        torch._foreach_lerp_(states, grads, 0.1)
        scale = torch._foreach_sqrt(torch._foreach_mul(states, states))
        torch._foreach_add_(scale, 1e-3)
        torch._foreach_addcdiv_(params, states, scale, -0.01)


def _clipped(kind: int, grads: Sequence[Tensor]) -> list[Tensor]:
    if kind == 0:
        return list(grads)
    norms = torch._foreach_norm(grads) if kind == 1 else [torch.linalg.vector_norm(g) for g in grads]
    total = torch.linalg.vector_norm(torch.stack(list(norms)))
    return list(torch._foreach_mul(grads, torch.clamp(0.3 / (total + 1e-6), max=1.0)))


def _plan(samples: int, r: random.Random) -> Plan:
    dp, tp = r.choice([(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 4), (2, 2), (3, 2), (2, 3), (4, 2)])
    dp = min(dp, samples)
    pp = r.choice([1, 1, 2, 3])
    sharded = r.random() < 0.6
    return Plan(
        dp,
        tp,
        pp,
        schedule=r.choice(["1f1b", "gpipe"]),
        micro=r.choice([1, 1, min(2, samples // dp), samples // dp]),
        recompute=r.choice(["none", "none", "default", "full"]),
        distribute_param=sharded,
        distribute_low_prec_param=sharded and r.random() < 0.5,
        shard=2 if sharded and dp == 4 and r.random() < 0.6 else None,
    )


def check(name: str) -> None:
    """Compare the step `name`, by a random plan, with plain PyTorch."""
    r = random.Random(name)
    torch.manual_seed(r.randrange(1000))
    model = r.choice(list(MODELS))
    samples = r.randint(4, 9)
    y = torch.randint(0, 5, (samples,))
    x = torch.randint(0, 11, (samples, 5)) if model is attention else torch.randn(samples, *MODELS[model])
    parameters, seed = Parameters(), r.random()
    model(parameters, random.Random(seed), x, y)
    params, (optimizer, clipping) = parameters.made, (r.randrange(3), r.randrange(3))
    n = len(params)

    def step(*tensors: Tensor) -> tuple[Tensor, ...]:
        inner = [p.detach().requires_grad_() for p in tensors[:n]]
        parameters.given = list(inner)
        loss = model(parameters, random.Random(seed), *tensors[-2:])
        phase("backward")
        grads = torch.autograd.grad(loss, inner)
        phase("optimizer")
        _updated(optimizer, tensors[:n], _clipped(clipping, grads), tensors[n:-2])
        return (loss.detach(),)

    tensors = [*params, *map(torch.zeros_like, params), x, y]
    plan = _plan(samples, r)
    graph = trace(step, tensors[:-2], tensors[-2:])
    plain = [t.clone() for t in tensors]
    expected = [*step(*plain), *(plain[o.replaces] for o in graph.outputs if o.replaces is not None)]
    try:
        found = run(lower(graph, plan, [None] * len(tensors)), tensors)
    except PlanError:
        return  # heads that tp does not divide, or too few layers
    about = f"step {name}, {model.__name__}, {plan}"
    for k, (a, b) in enumerate(zip(found, expected, strict=True)):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=lambda m, k=k: f"{about}, output {k}: {m}")


@pytest.fixture(autouse=True)
def _small_states_are_spread(double_precision, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moai.lower.inputs._MIN_STATE", 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_random_step_gives_one_devices_numbers(seed: int):
    for k in range(STEPS_A_SEED):
        check(f"{seed}/{k}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4, 100))
def test_many_random_steps_give_one_devices_numbers(seed: int):
    for k in range(STEPS_A_SEED):
        check(f"{seed}/{k}")
