"""Random chains of operators, on any mesh and on inputs that lie anyhow, give what plain PyTorch gives."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from moai.lower import lower
from moai.plan.plan import Plan
from tests.lower.lockstep import run
from tests.lower.placements import random_placement
from tests.lower.step_tracing import phase, trace

Tensor = torch.Tensor
Step = Callable[[list[Tensor]], Tensor]
SEEDS, CHAINS_A_SEED = 8, 25


def _dim(t: Tensor, r: random.Random) -> int:
    return r.randrange(-t.dim(), t.dim()) if t.dim() else 0


def _regrouped(t: Tensor, r: random.Random) -> Tensor:
    """`t` with two neighbouring dims flattened, or one dim split in two."""
    if t.dim() > 1 and r.random() < 0.5:
        d = r.randrange(t.dim() - 1)
        return t.flatten(d, d + 1)
    if t.dim() == 0 or t.dim() > 3:
        return t.reshape(-1)
    d = r.randrange(t.dim())
    factors = [f for f in range(1, t.size(d) + 1) if t.size(d) % f == 0]
    return t.unflatten(d, (r.choice(factors), -1))


def _sliced(t: Tensor, r: random.Random) -> Tensor:
    if t.dim() == 0:
        return t
    d = _dim(t, r)
    begin = r.randrange(t.size(d))
    return t.narrow(d, begin, r.randint(1, t.size(d) - begin))


def _product(t: Tensor, r: random.Random) -> Tensor:
    if t.dim() == 2:
        return t @ t.t() if r.random() < 0.5 else torch.addmm(t.sum(0)[: t.size(1)], t, t.t() @ t)
    return t @ t.transpose(-1, -2) if t.dim() == 3 else t * 2


def _batched_product(t: Tensor, r: random.Random) -> Tensor:
    """Batch dims are flattened, and perhaps taken apart again."""
    if t.dim() < 4:
        return t
    flat = t.flatten(0, 1)
    found = (torch.bmm(flat, flat.transpose(1, 2) * 2) + 1).softmax(-1)
    return found if r.random() < 0.3 else found.unflatten(0, t.shape[:2])


ONE: list[Callable[[Tensor, random.Random], Any]] = [
    lambda t, r: t.tanh(),
    lambda t, r: t * 0.5 + 1,
    lambda t, r: t.neg() / 3,
    lambda t, r: (t > 0).to(t.dtype),
    lambda t, r: torch.where(t > 0, t, 0.1),
    lambda t, r: t.masked_fill(t < 0, 0.5),
    lambda t, r: t.sum(_dim(t, r), keepdim=r.random() < 0.5) if t.dim() else t,
    lambda t, r: t.mean(_dim(t, r), keepdim=r.random() < 0.5) if t.dim() else t,
    lambda t, r: t.amax(_dim(t, r), keepdim=True) if t.dim() else t,
    lambda t, r: t.mean() * t,
    lambda t, r: t / (t.norm() + 1),
    lambda t, r: t.softmax(_dim(t, r)) if t.dim() else t,
    lambda t, r: t.cumsum(_dim(t, r)) if t.dim() else t,
    lambda t, r: t.sort(_dim(t, r))[0] if t.dim() else t,
    lambda t, r: t.transpose(_dim(t, r), _dim(t, r)) if t.dim() else t,
    lambda t, r: t.unsqueeze(r.randint(0, t.dim())) if t.dim() < 4 else t.squeeze(),
    lambda t, r: t.expand(2, *t.shape) if t.dim() < 3 else t,
    lambda t, r: t.select(_dim(t, r), 0) if t.dim() else t,
    lambda t, r: t.flip(_dim(t, r)) if t.dim() else t,
    lambda t, r: torch.cat([t, t * 2], _dim(t, r)) if t.dim() > 0 and t.numel() < 500 else t,
    lambda t, r: torch.stack([t, t.cos()], r.randint(0, t.dim())) if t.dim() < 4 and t.numel() < 500 else t,
    lambda t, r: t.chunk(2, _dim(t, r))[-1] if t.dim() else t,
    lambda t, r: t.tril() if t.dim() > 1 else t,
    lambda t, r: torch.nn.functional.layer_norm(t, t.shape[-1:]) if t.dim() > 1 else t,
    lambda t, r: torch.nn.functional.pad(t, (1, 0)) if t.dim() else t,
    lambda t, r: t.index_select(0, torch.arange(2) * (t.size(0) - 1)) if t.dim() else t,
    lambda t, r: t[torch.arange(3).clamp(max=t.size(0) - 1)] if t.dim() else t,
    lambda t, r: t.gather(0, torch.zeros_like(t, dtype=torch.int64)) if t.dim() else t,
    lambda t, r: torch.zeros_like(t).index_add(0, torch.arange(t.size(0)), t) if t.dim() else t,
    _regrouped,
    _sliced,
    _product,
    _batched_product,
]
TWO: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda a, b: a + b,
    lambda a, b: a * b,
    lambda a, b: a - 2 * b,
    lambda a, b: torch.maximum(a, b),
    lambda a, b: torch.cat([a, b]) if a.dim() else torch.stack([a, b]),
]


def _chain(inputs: list[Tensor], seed: str) -> list[Tensor]:
    """A chain of random operators, the same for the same seed; some results are reused, some are given back.

    What comes first is the forward, what comes last the backward, and perhaps the optimizer.
    """
    r = random.Random(seed)
    made = list(inputs)
    length = r.randint(3, 12)
    begins = {r.randrange(length): "backward"} | ({length - 1: "optimizer"} if r.random() < 0.2 else {})
    for k in range(length):
        if k in begins:
            phase(begins[k])
        t = r.choice(made[-3:])
        peers = [p for p in made if p.shape == t.shape]
        made.append(r.choice(TWO)(t, r.choice(peers)) if r.random() < 0.3 else r.choice(ONE)(t, r))
        if made[-1].numel() > 2000 or made[-1].numel() == 0:
            made.pop()
    return [t.clone() for t in made[-2:]]


def _plan(samples: int, r: random.Random) -> Plan:
    """Any mesh whose devices and passes have a sample each, or one without passes."""
    dp, tp = r.choice([(1, 1), (2, 1), (3, 1), (4, 1), (1, 2), (1, 3), (2, 2), (3, 2), (4, 2)])
    micro = r.randint(1, max(samples // dp, 1))
    shard = 2 if dp == 4 and r.random() < 0.5 else None
    return Plan(dp, tp, micro=micro, shard=shard, distribute_param=r.random() < 0.5)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_chain_gives_one_devices_numbers(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moai.lower.inputs._MIN_STATE", 1)
    for k in range(CHAINS_A_SEED):
        check(f"{seed}/{k}")


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(SEEDS, 20 * SEEDS))
def test_many_random_chains_give_one_devices_numbers(seed: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moai.lower.inputs._MIN_STATE", 1)
    for k in range(CHAINS_A_SEED):
        check(f"{seed}/{k}")


def check(name: str) -> None:
    """Compare the chain `name` on some mesh, with inputs that lie anyhow, with plain PyTorch."""
    torch.set_num_threads(1)
    r = random.Random(name)
    torch.manual_seed(r.randrange(1000))
    shape = [r.randint(1, 9), *(r.randint(1, 7) for _ in range(r.randrange(3)))]
    inputs = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    plan = _plan(shape[0], r)
    graph = trace(lambda *args: tuple(_chain(list(args), name)), inputs[:1], inputs[1:])
    given = [random_placement(t.shape, plan.mesh, r) if r.random() < 0.6 else None for t in inputs]
    program = lower(graph, plan, given)
    about = f"chain {name}, {plan}, inputs {', '.join(map(str, given))}"
    for a, b in zip(run(program, inputs), _chain(inputs, name), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, equal_nan=True, msg=lambda m: f"{about}: {m}")
