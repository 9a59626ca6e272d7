"""Whatever the number of devices, a step gives the numbers of one device on the global batch (fp64, to 1e-10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lockstep import run
from step_tracing import trace

import moai.graph.ops  # noqa: F401
from moai.lower import Program, lower
from moai.plan.plan import Plan

Tensors = Sequence[torch.Tensor]
DEVICES = (1, 2, 3, 4)


@pytest.fixture(autouse=True)
def _double_precision():
    torch.manual_seed(0)
    torch.set_num_threads(1)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def check(fn: Callable[..., Any], state: Tensors, batch: Tensors, devices: Sequence[int] = DEVICES) -> Program:
    """Compare `fn` on one plain device with its program on each number of devices; gives the last program."""
    graph = trace(fn, state, batch)
    plain = [t.clone() for t in (*state, *batch)]
    expected = list(fn(*plain))
    expected += [plain[o.replaces] for o in graph.outputs if o.replaces is not None]
    for n in devices:
        program = lower(graph, Plan(n), [None] * len(graph.inputs))
        found = run(program, [*state, *batch])
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, n=n, k=k: f"{n}, output {k}: {m}")
    return program


def gradients(loss: torch.Tensor, leaves: Tensors) -> Tensors:
    return torch.autograd.grad(loss, leaves)


def leaves(tensors: Tensors) -> list[torch.Tensor]:
    return [t.detach().requires_grad_() for t in tensors]


def sgd(params: Tensors, grads: Tensors, lr: float = 0.1) -> None:
    for p, g in zip(params, grads, strict=True):
        p.add_(g, alpha=-lr)


def labels(*shape: int, classes: int) -> torch.Tensor:
    """Class labels of which some are ignored, more in the first half of the batch than in the second."""
    found = torch.randint(0, classes, shape)
    found[0] = -100
    found.flatten()[1::3] = -100
    return found


# -- models


def mlp_loss(params: Tensors, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    w1, b1, w2 = params
    return F.cross_entropy(F.linear(F.linear(x, w1, b1).relu(), w2), y)


def mlp_state() -> list[torch.Tensor]:
    return [torch.randn(16, 8), torch.randn(16), torch.randn(10, 16)]


HEADS, WIDTH, VOCAB, LENGTH = 2, 8, 16, 5


def transformer_state() -> list[torch.Tensor]:
    """Tied embedding, then for each of two blocks: norm weight and bias, qkv, projection, up, down."""
    state = [torch.randn(VOCAB, WIDTH) * 0.3]
    for _ in range(2):
        state += [torch.ones(WIDTH), torch.zeros(WIDTH), torch.randn(3 * WIDTH, WIDTH) * 0.3]
        state += [torch.randn(WIDTH, WIDTH) * 0.3, torch.randn(32, WIDTH) * 0.3, torch.randn(WIDTH, 32) * 0.3]
    return state


def transformer_loss(params: Tensors, ids: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    embedding, *rest = params
    b, s = ids.shape
    h = F.embedding(ids, embedding)
    mask = torch.ones(s, s, dtype=torch.bool).tril()
    for k in range(0, len(rest), 6):
        gain, shift, qkv, out, up, down = rest[k : k + 6]
        normed = F.layer_norm(h, (WIDTH,), gain, shift)
        q, key, v = F.linear(normed, qkv).view(b, s, 3, HEADS, WIDTH // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q @ key.transpose(-1, -2)) / (WIDTH // HEADS) ** 0.5
        scores = scores.masked_fill(~mask, float("-inf"))
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, s, WIDTH)
        h = h + F.linear(mixed, out)
        h = h + F.linear(F.gelu(F.linear(rms_norm(h, gain), up)), down)
    logits = F.linear(h, embedding)
    return F.cross_entropy(logits.view(-1, VOCAB), targets.view(-1), ignore_index=-100)


def rms_norm(x: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


def transformer_batch(size: int) -> list[torch.Tensor]:
    return [torch.randint(0, VOCAB, (size, LENGTH)), labels(size, LENGTH, classes=VOCAB)]


# -- whole steps


@pytest.mark.parametrize("size", [8, 7, 3])
def test_mlp_with_unevenly_ignored_labels(size: int):
    def step(w1, b1, w2, x, y):
        params = leaves((w1, b1, w2))
        loss = mlp_loss(params, x, y)
        sgd((w1, b1, w2), gradients(loss, params))
        return (loss.detach(),)

    check(step, mlp_state(), [torch.randn(size, 8), labels(size, classes=10)])


@pytest.mark.parametrize("size", [8, 7])
def test_transformer_with_tied_embedding(size: int):
    def step(*args):
        params = leaves(args[:-2])
        loss = transformer_loss(params, *args[-2:])
        sgd(args[:-2], gradients(loss, params))
        return (loss.detach(),)

    program = check(step, transformer_state(), transformer_batch(size))
    assert program.notes == ()


def test_batch_smaller_than_the_number_of_devices():
    def step(w1, b1, w2, x, y):
        return (mlp_loss((w1, b1, w2), x, y),)

    check(step, mlp_state(), [torch.randn(2, 8), torch.randint(0, 10, (2,))], devices=(3, 4))
