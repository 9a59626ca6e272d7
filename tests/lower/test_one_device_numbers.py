"""Whatever the number of devices, a step gives the numbers of one device on the global batch (fp64, to 1e-10)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import moai.graph.ops  # noqa: F401
from moai.lower import Program, lower
from moai.plan.plan import Plan
from tests.lower.lockstep import run
from tests.lower.step_tracing import phase, trace

Tensors = Sequence[torch.Tensor]
SHARDED = {"distribute_param": True}
LOW = {"distribute_param": True, "distribute_low_prec_param": True}
PLANS = (
    Plan(),
    Plan(dp=2),
    Plan(dp=3),
    Plan(dp=4),
    Plan(micro=3),
    Plan(dp=2, micro=2),
    Plan(dp=3, micro=2),
    Plan(dp=2, **SHARDED),
    Plan(dp=3, micro=2, **SHARDED),
    Plan(dp=3, **LOW),
    Plan(dp=2, micro=3, **LOW),
    Plan(dp=4, shard=2, **SHARDED),
    Plan(dp=4, shard=2, **LOW),
    Plan(tp=2),
    Plan(tp=3, micro=2),
    Plan(dp=2, tp=2),
    Plan(dp=2, tp=2, micro=2, **SHARDED),
    Plan(dp=2, tp=2, **LOW),
    Plan(dp=2, recompute="default"),
    Plan(tp=2, micro=2, recompute="full"),
    Plan(dp=2, micro=2, recompute="full", **LOW),
)


@pytest.fixture(autouse=True)
def _small_states_are_spread(double_precision, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moai.lower.inputs._MIN_STATE", 1)


def check(fn: Callable[..., Any], state: Tensors, batch: Tensors, plans: Sequence[Plan] = PLANS) -> Program:
    """Compare `fn` on one plain device with its program by each plan; gives the last program over the batch alone."""
    graph = trace(fn, state, batch)
    plain = [t.clone() for t in (*state, *batch)]
    expected = list(fn(*plain))
    expected += [plain[o.replaces] for o in graph.outputs if o.replaces is not None]
    last: Any = None
    for plan in plans:
        if plan.micro > 1 and len(batch[0]) < plan.dp * plan.micro:
            continue
        program = lower(graph, plan, [None] * len(graph.inputs))
        found = run(program, [*state, *batch])
        for k, (a, b) in enumerate(zip(found, expected, strict=True)):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10, msg=lambda m, p=plan, k=k: f"{p}, output {k}: {m}")
        if plan == Plan(dp=plan.dp):
            last = program
    return last


def gradients(loss: torch.Tensor, leaves: Tensors) -> Tensors:
    phase("backward")
    found = torch.autograd.grad(loss, leaves)
    phase("optimizer")
    return found


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


def transformer_state(blocks: int = 2) -> list[torch.Tensor]:
    """Tied embedding, then for each block: norm weight and bias, qkv, projection, up, down."""
    state = [torch.randn(VOCAB, WIDTH) * 0.3]
    for _ in range(blocks):
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

    check(step, mlp_state(), [torch.randn(2, 8), torch.randint(0, 10, (2,))], [Plan(dp=3), Plan(dp=4)])


# -- optimizers


def adamw_single(params: Tensors, grads: Tensors, m: Tensors, v: Tensors, step: Tensors) -> None:
    for p, g, exp_avg, exp_avg_sq, t in zip(params, grads, m, v, step, strict=True):
        t.add_(1)
        p.mul_(1 - 1e-3)
        exp_avg.lerp_(g, 0.1)
        exp_avg_sq.mul_(0.99).addcmul_(g, g, value=0.01)
        size = 1e-2 / (1 - 0.9**t)
        p.add_(-size * exp_avg / ((exp_avg_sq / (1 - 0.99**t)).sqrt() + 1e-8))


def adamw_foreach(params: Tensors, grads: Tensors, m: Tensors, v: Tensors, step: Tensors) -> None:
    torch._foreach_add_(step, 1)
    torch._foreach_mul_(params, 1 - 1e-3)
    torch._foreach_lerp_(m, grads, 0.1)
    torch._foreach_mul_(v, 0.99)
    torch._foreach_addcmul_(v, grads, grads, 0.01)
    one = torch._foreach_pow(0.99, step)
    torch._foreach_neg_(one)
    torch._foreach_add_(one, 1)
    scale = torch._foreach_div(v, one)
    torch._foreach_sqrt_(scale)
    torch._foreach_add_(scale, 1e-8)
    torch._foreach_addcdiv_(params, m, scale, -1e-2)


def adamw_fused(params: Tensors, grads: Tensors, m: Tensors, v: Tensors, step: Tensors) -> None:
    torch._foreach_add_(step, 1)
    torch._fused_adamw_(
        params, grads, m, v, [], step,
        lr=1e-2, beta1=0.9, beta2=0.99, weight_decay=0.1, eps=1e-8, amsgrad=False, maximize=False,
    )  # fmt: skip


@pytest.mark.parametrize("optimizer", [adamw_single, adamw_foreach, adamw_fused])
@pytest.mark.parametrize("returns_gradients", [False, True])
def test_adamw(optimizer: Callable[..., None], returns_gradients: bool):
    def step(*args):
        params, m, v, t = args[0:3], args[3:6], args[6:9], args[9:12]
        inner = leaves(params)
        loss = mlp_loss(inner, *args[12:])
        grads = gradients(loss, inner)
        optimizer(params, grads, m, v, t)
        return (loss.detach(), *(grads if returns_gradients else ()))

    params = mlp_state()
    state = [*params, *map(torch.zeros_like, params), *map(torch.zeros_like, params)]
    steps = [torch.zeros((), dtype=torch.float32 if optimizer is adamw_fused else None) for _ in params]
    check(step, [*state, *steps], [torch.randn(7, 8), labels(7, classes=10)])


def test_sgd_with_momentum_and_weight_decay():
    def step(*args):
        params, momentum = args[:3], args[3:6]
        inner = leaves(params)
        loss = mlp_loss(inner, *args[6:])
        for p, m, g in zip(params, momentum, gradients(loss, inner), strict=True):
            g = g.add(p, alpha=0.01)
            m.mul_(0.9).add_(g, alpha=0.9)
            p.add_(m, alpha=-0.1)
        return (loss.detach(),)

    params = mlp_state()
    check(step, [*params, *map(torch.zeros_like, params)], [torch.randn(7, 8), labels(7, classes=10)])


@pytest.mark.parametrize("foreach", [False, True])
def test_gradient_clipping_by_the_global_norm(foreach: bool):
    def step(*args):
        inner = leaves(args[:3])
        loss = mlp_loss(inner, *args[3:])
        grads = list(gradients(loss, inner))
        norms = torch._foreach_norm(grads) if foreach else [torch.linalg.vector_norm(g) for g in grads]
        total = torch.linalg.vector_norm(torch.stack(list(norms)))
        scale = torch.clamp(0.5 / (total + 1e-6), max=1.0)
        if foreach:
            torch._foreach_mul_(grads, scale)
        else:
            grads = [g * scale for g in grads]
        sgd(args[:3], grads)
        return (loss.detach(), total)

    check(step, mlp_state(), [torch.randn(7, 8), labels(7, classes=10)])


# -- layers


def training_step(forward: Callable[..., torch.Tensor], n_params: int) -> Callable[..., Any]:
    """The loss `forward(params, *batch)` and its gradients."""

    def step(*args):
        params = leaves(args[:n_params])
        loss = forward(params, *args[n_params:])
        return (loss.detach(), *gradients(loss, params))

    return step


def check_layer(forward: Callable[..., torch.Tensor], params: Tensors, *batch: torch.Tensor) -> Program:
    program = check(training_step(forward, len(params)), params, batch)
    assert program.notes == ()
    return program


def test_convolution_and_pooling():
    def forward(params, x, y):
        h = F.max_pool2d(F.conv2d(x, params[0], params[1], padding=1).relu(), 2)
        h = F.adaptive_avg_pool2d(F.group_norm(h, 2, params[2], params[3]), 2)
        return F.cross_entropy(h.flatten(1) @ params[4], y)

    params = [torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(4), torch.randn(4), torch.randn(16, 10)]
    check_layer(forward, params, torch.randn(7, 3, 8, 8), labels(7, classes=10))


def test_batch_norm_uses_the_statistics_of_the_whole_batch():
    def forward(params, x):
        return (F.batch_norm(x, None, None, params[0], params[1], training=True) * x.cos()).square().mean()

    check_layer(forward, [torch.randn(3), torch.randn(3)], torch.randn(7, 3, 4, 4))


def test_batch_norm_updates_its_running_statistics():
    def step(weight, bias, mean, var, x):
        functional = torch.ops.aten._native_batch_norm_legit_functional
        out, _, _, new_mean, new_var = functional(x, weight, bias, mean, var, True, 0.1, 1e-5)
        mean.copy_(new_mean)
        var.copy_(new_var)
        return (out,)

    state = [torch.randn(3), torch.randn(3), torch.zeros(3), torch.ones(3)]
    check(step, state, [torch.randn(7, 3, 4, 4)])


def test_batch_norm_in_evaluation(monkeypatch: pytest.MonkeyPatch):
    # Without data torch gives statistics of another shape. A step of a script has none: they are written as arithmetic.
    monkeypatch.setenv("MOAI_VALIDATE", "0")

    def forward(params, x):
        return (
            F.batch_norm(x, params[2].detach(), params[3].detach().abs(), params[0], params[1]).square().sum()
            + (params[2] + params[3]).sum()
        )

    check_layer(forward, [torch.randn(3) for _ in range(4)], torch.randn(7, 3, 4, 4))


def test_attention():
    def forward(params, x):
        q, k, v = (x @ p for p in params)
        out, lse = torch.ops.moai.sdpa(q, k, v, None, True, None, False)
        return out.square().mean() + lse.sum()

    def step(*args):
        *params, x, mask = args
        q, k, v = (x @ p for p in params)
        out, lse = torch.ops.moai.sdpa(q, k, v, mask, False, None, False)
        grads = torch.ops.moai.sdpa_backward(out.cos(), q, k, v, out, lse, mask, False, None, False)
        return (out, *(x.transpose(-1, -2).reshape(-1, 4, 5).sum(0) @ g.sum((0, 1)) for g in grads))

    params = [torch.randn(4, 4) for _ in range(3)]
    check(step, params, [torch.randn(7, 6, 5, 4), torch.randn(7, 1, 5, 5)])


def test_rms_norm_and_layer_norm_kernels():
    def forward(params, x):
        h = F.rms_norm(x, (8,), params[0])
        return F.layer_norm(h, (8,), params[1], params[2]).pow(3).mean()

    check_layer(forward, [torch.randn(8) for _ in range(3)], torch.randn(7, 5, 8))


@pytest.mark.parametrize("loss", [F.mse_loss, F.smooth_l1_loss, F.huber_loss, F.l1_loss])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_regression_losses(loss: Callable[..., torch.Tensor], reduction: str):
    def forward(params, x, y):
        return loss(x @ params[0], y, reduction=reduction).sum()

    check_layer(forward, [torch.randn(8, 4)], torch.randn(7, 8), torch.randn(7, 4))


def test_binary_losses():
    def forward(params, x, y):
        scores = x @ params[0]
        return F.binary_cross_entropy_with_logits(scores, y) + F.binary_cross_entropy(scores.sigmoid(), y)

    check_layer(forward, [torch.randn(8, 4)], torch.randn(7, 8), torch.rand(7, 4))


def test_class_loss_of_images():
    def forward(params, x, y):
        return F.cross_entropy(torch.einsum("nchw,cd->ndhw", x, params[0]), y)

    check_layer(forward, [torch.randn(3, 5)], torch.randn(7, 3, 4, 4), labels(7, 4, 4, classes=5))


def test_weighted_and_smoothed_class_loss():
    def forward(params, x, y):
        return F.cross_entropy(x @ params[0], y, weight=params[1].detach().abs(), label_smoothing=0.1) + params[1].sum()

    check_layer(forward, [torch.randn(8, 5), torch.randn(5)], torch.randn(7, 8), labels(7, classes=5))


def test_contrastive_loss_between_all_samples_of_the_batch():
    def forward(params, a, b):
        scores = F.normalize(a @ params[0], dim=-1) @ F.normalize(b @ params[0], dim=-1).T
        return F.cross_entropy(scores, torch.arange(7)) + F.cross_entropy(scores.T, torch.arange(7))

    check_layer(forward, [torch.randn(8, 4)], torch.randn(7, 8), torch.randn(7, 8))


def test_dropout_drops_the_same_entries_on_any_number_of_devices():
    def forward(params, x):
        h = x @ params[0]
        keep = torch.ops.moai.random(h.shape, "bernoulli", 0.8, 0.0, 123, 0, torch.float64)
        return (h * keep / 0.8).square().mean()

    program = check_layer(forward, [torch.randn(8, 4)], torch.randn(7, 5, 8))
    (drawn,) = [i for i in program.instructions if i.op == "moai.random.default"]
    assert drawn.shapes[0][0].values == (2, 2, 2, 1), "every device is to draw its own rows only"


def test_variance_and_norm_over_the_batch():
    def forward(params, x):
        h = x @ params[0]
        return h.var() + h.norm() + h.std(0).sum() + h.amax() + h.logsumexp(0).sum() + h.norm(dim=0).sum()

    check_layer(forward, [torch.randn(8, 4)], torch.randn(7, 8))


def test_look_ups_by_index():
    def forward(params, x, at):
        table = params[0] + x.mean()
        picked = table[at] + table.index_select(0, at) + table.gather(0, at[:, None].expand(7, 4))
        last = (x @ params[0])[torch.arange(7), at % 4]
        return (picked * x[:, :4]).sum() + last.sum()

    check_layer(forward, [torch.randn(8, 4)], torch.randn(7, 8), torch.randint(0, 8, (7,)))
