"""Random programs of views, writes and reads give on the accelerator what they give on the CPU."""

from __future__ import annotations

import os
import random
from collections.abc import Callable

import pytest
import torch

from tests.capture.compare import assert_same, randn
from tests.capture.conftest import on_the_host_or_not

# Many more by hand: MOAI_TEST_PROGRAMS=20000 pytest tests/capture/test_programs.py
PROGRAMS = int(os.environ.get("MOAI_TEST_PROGRAMS", "800"))
CHUNKS = 8

Tensor = torch.Tensor
Choice = random.Random

VIEWS: list[Callable[[Tensor, Choice], Tensor]] = [
    lambda t, r: t.t() if t.dim() == 2 else t.unsqueeze(0),
    lambda t, r: t.select(0, r.randrange(t.size(0))) if t.dim() > 1 else t[r.randrange(t.size(0)) :],
    lambda t, r: t.transpose(0, -1),
    lambda t, r: t.narrow(-1, 0, r.randint(1, t.size(-1))),
    lambda t, r: t.unsqueeze(r.randint(0, t.dim())),
    lambda t, r: t.squeeze(),
    lambda t, r: t.chunk(2, -1)[-1],
    lambda t, r: t[..., ::2],
    lambda t, r: t.reshape(-1),
    lambda t, r: t.permute(*reversed(range(t.dim()))),
    lambda t, r: t.detach(),
    lambda t, r: t.unbind(0)[0] if t.dim() > 1 else t,
    lambda t, r: t.as_strided((2,), (1,), t.storage_offset()) if t.numel() >= 4 and t.is_contiguous() else t,
    lambda t, r: t.as_strided((2, 2), (1, 1), t.storage_offset()) if t.numel() >= 4 and t.is_contiguous() else t,
    lambda t, r: t.as_strided((2, 2), (2, 1), 1) if t.untyped_storage().nbytes() >= 5 * t.element_size() else t,
    lambda t, r: t.diagonal() if t.dim() == 2 else t,
    lambda t, r: t.unfold(-1, 2, 1) if t.size(-1) >= 2 and t.dim() < 4 else t,
    lambda t, r: t.expand(2, *t.shape) if t.dim() < 4 else t,
    lambda t, r: t.view(-1, 2) if t.is_contiguous() and t.numel() % 2 == 0 else t,
    lambda t, r: t.view(torch.int32).view(torch.float32) if t.dtype == torch.float32 else t,
]

FUNCTIONS: list[Callable[[Tensor, Choice], Tensor]] = [
    lambda t, r: t * 2 + round(r.random(), 2),
    lambda t, r: t.clone(),
    lambda t, r: t.contiguous(),
    lambda t, r: torch.cat([t, t]),
    lambda t, r: t.sum(0, keepdim=True),
    lambda t, r: t.tanh(),
    lambda t, r: t.double() if t.dtype == torch.float32 else t.float(),
    lambda t, r: torch.empty_like(t).copy_(t),
    lambda t, r: torch.zeros_like(t),
    lambda t, r: t.index_select(0, torch.tensor([0, t.size(0) - 1]).to(t.device)),
]


def _masked(t: Tensor) -> Tensor:
    return t > 0.5


WRITES: list[Callable[[Tensor, Tensor, Choice], object]] = [
    lambda t, o, r: t.add_(round(r.random(), 2)),
    lambda t, o, r: t.mul_(0.5 + round(r.random(), 2)),
    lambda t, o, r: t.zero_(),
    lambda t, o, r: t.fill_(r.randrange(5)),
    lambda t, o, r: t.fill_(o.reshape(-1)[0].clone()),
    lambda t, o, r: t.copy_(o.reshape(-1)[:1].clone()),
    lambda t, o, r: t.copy_(t.clone().flip(0)),
    lambda t, o, r: t.copy_(t.select(0, 0).clone()),
    lambda t, o, r: t.clamp_(-0.5, 0.5),
    lambda t, o, r: t.relu_(),
    lambda t, o, r: t.masked_fill_(_masked(t), -1.0),
    lambda t, o, r: t.__setitem__(_masked(t), 3.0),
    lambda t, o, r: t.__setitem__(0, 1.5),
    lambda t, o, r: t.__setitem__((Ellipsis, slice(0, 1)), 2.5),
    lambda t, o, r: t.sub_(t.clone() * 0.5),
    lambda t, o, r: t.sub_(o.clone().sum() * 0.1),
    lambda t, o, r: t.index_fill_(0, torch.tensor([0]).to(t.device), 4.0),
    lambda t, o, r: t.index_put_((torch.tensor([0, 0]).to(t.device),), t[:1].clone(), accumulate=True),
    lambda t, o, r: torch.mul(t.clone(), 0.5, out=t),
    lambda t, o, r: torch._foreach_add_([t], 0.25),
    lambda t, o, r: torch._foreach_mul_([t, o] if not _overlaps(o) else [t], 0.75),
]


def _overlaps(t: Tensor) -> bool:
    """Whether two elements are one place in memory: torch refuses to write those."""
    places = {0}
    for size, stride in zip(t.size(), t.stride(), strict=True):
        places = {p + k * stride for p in places for k in range(size)}
    return len(places) != t.numel()


def run(seed: int, device: str) -> tuple[list[Tensor], list[float]]:
    """Run program `seed`; returns its tensors and what it read on the way."""
    r = random.Random(seed)
    pool = [
        randn(4, 6, seed=seed).to(device),
        randn(2, 3, 4, seed=seed + 1).to(device),
        randn(6, 4, seed=seed + 2).double().to(device).t(),
    ]
    reads = []
    for _ in range(r.randint(8, 30)):
        t, o = r.choice(pool), r.choice(pool)
        step = r.random()
        if t.numel() == 0 or t.dim() == 0 or o.numel() == 0:
            continue
        if step < 0.35:
            pool.append(r.choice(VIEWS)(t, Choice(r.random())))
        elif step < 0.75:
            write, detail = r.choice(WRITES), Choice(r.random())
            if not _overlaps(t):
                write(t, o, detail)
        elif step < 0.85:
            pool.append(r.choice(FUNCTIONS)(t, Choice(r.random())))
        elif step < 0.92 and len(pool) > 2:
            pool.pop(r.randrange(len(pool)))
        else:
            reads.append(t.sum().item())
    return [t.cpu().clone() for t in pool], reads


@on_the_host_or_not
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_a_random_program_computes_what_the_cpu_computes(chunk: int) -> None:
    for seed in range(chunk, PROGRAMS, CHUNKS):
        expected = run(seed, "cpu")
        for attempt in ("described", "replayed"):
            try:
                assert_same(run(seed, "cuda"), expected, rtol=1e-4, atol=1e-5)
            except Exception as error:
                raise AssertionError(f"program {seed}, {attempt}: {error}") from error
