"""Operators of vision, audio and graphs are computed by each device for its own samples, forwards and backwards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from moai.lower import lower
from moai.plan.plan import Plan
from tests.lower.lockstep import run
from tests.lower.sections import ops
from tests.lower.step_tracing import trace

pytestmark = pytest.mark.usefixtures("double_precision")

IMAGES, ROWS, MATRICES = (4, 4, 6, 6), (4, 3, 8), (4, 3, 3)
CASES = {
    "grid_sample": (lambda x: F.grid_sample(x, x[:, :2].tanh().permute(0, 2, 3, 1), align_corners=False), IMAGES),
    "adaptive_max_pool2d": (lambda x: F.adaptive_max_pool2d(x, 3), IMAGES),
    "interpolate linear": (lambda x: F.interpolate(x, scale_factor=2, mode="linear"), ROWS),
    "interpolate trilinear": (lambda x: F.interpolate(x[None].transpose(0, 1), (5, 3, 8), mode="trilinear"), IMAGES),
    "interpolate nearest-exact": (lambda x: F.interpolate(x, 9, mode="nearest-exact"), IMAGES),
    "interpolate antialiased": (lambda x: F.interpolate(x, 3, mode="bilinear", antialias=True), IMAGES),
    "reflection_pad1d": (lambda x: F.pad(x, (2, 1), "reflect"), ROWS),
    "replication_pad1d": (lambda x: F.pad(x, (2, 1), "replicate"), ROWS),
    "pixel_shuffle": (lambda x: F.pixel_unshuffle(F.pixel_shuffle(x, 2), 3), IMAGES),
    "unfold and fold": (lambda x: F.fold(F.unfold(x, 3), (6, 6), 3), IMAGES),
    "logsigmoid": (F.logsigmoid, ROWS),
    "prelu": (lambda x: F.prelu(x, torch.full((1,), 0.25)), ROWS),
    "norm": (lambda x: x.norm(dim=-1) + torch.norm(x, p=1, dim=2), ROWS),
    "kthvalue": (lambda x: x.kthvalue(2, dim=-1).values, ROWS),
    "index_copy": (lambda x: x.index_copy(1, torch.arange(2) * 2, x[:, :2]), ROWS),
    "index_fill": (lambda x: x.index_fill(1, torch.arange(2) * 2, 7.0), ROWS),
    "bucketize": (lambda x: x * torch.bucketize(x.detach(), torch.arange(3.0) - 1), ROWS),
    "fft": (lambda x: torch.fft.fft(torch.complex(x, x.tanh())).abs(), ROWS),
    "inv": (lambda x: torch.linalg.inv_ex(x + 5 * torch.eye(3)).inverse, MATRICES),
    "eigh": (lambda x: torch.linalg.eigh(x + x.mT).eigenvalues, MATRICES),
    "cdist": (lambda x: torch.cdist(x[:, 0], torch.arange(16.0).reshape(2, 8)), ROWS),
}


@pytest.mark.parametrize("case", CASES)
def test_each_device_computes_its_own_samples(case: str) -> None:
    fn, size = CASES[case]

    def step(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = x.detach().requires_grad_()
        y = fn(x)
        return y.detach(), torch.autograd.grad(y.square().sum(), x)[0]

    x = torch.randn(size)
    program = lower(trace(step, [], [x]), Plan(dp=2), [None])
    for found, expected in zip(run(program, [x]), step(x), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert program.notes == ()
    assert "all_gather" not in ops(program.instructions)
