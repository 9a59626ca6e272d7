"""Random numbers: new in every step, the same for a seed, and distributed as their name says."""

from __future__ import annotations

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.capture.compare import assert_same, randn
from tests.capture.conftest import Observed, on_the_host_or_not

N = 20_000


def masks(steps: int) -> list[torch.Tensor]:
    return [torch.nn.functional.dropout(torch.ones(64).to("cuda"), 0.5).cpu() for _ in range(steps)]


def test_dropout_differs_from_step_to_step(capture: Observed) -> None:
    first, second, third = masks(3)
    assert not torch.equal(first, second)
    assert not torch.equal(second, third)
    assert len(capture.graphs) == 1


def test_dropout_repeats_for_a_seed() -> None:
    torch.manual_seed(7)
    first = masks(3)
    torch.manual_seed(7)
    assert_same(masks(3), first)
    torch.cuda.manual_seed(8)
    assert not torch.equal(masks(1)[0], first[0])


def test_two_draws_of_a_step_differ() -> None:
    a, b = torch.rand(64, device="cuda"), torch.rand(64, device="cuda")
    assert not torch.equal(a, b)


def test_dropout_scales_what_it_keeps() -> None:
    y = torch.nn.functional.dropout(torch.ones(N).to("cuda"), 0.25).cpu()
    assert y.unique().tolist() == [0.0, pytest.approx(1 / 0.75)]
    assert (y == 0).float().mean().item() == pytest.approx(0.25, abs=0.02)


def test_dropout_of_nothing_and_of_everything() -> None:
    x = randn(8).to("cuda")
    assert_same(torch.nn.functional.dropout(x, 0.0), randn(8))
    assert_same(torch.nn.functional.dropout(x, 1.0), torch.zeros(8))
    assert_same(torch.nn.functional.dropout(x, 0.5, training=False), randn(8))


def test_the_backward_of_dropout_uses_the_mask_of_its_forward() -> None:
    x = torch.nn.Parameter(torch.ones(64).to("cuda"))
    y = torch.nn.functional.dropout(x, 0.5)
    y.sum().backward()
    assert_same(x.grad, y)


def test_a_generator_has_a_stream_of_its_own() -> None:
    def draw(seed: int) -> torch.Tensor:
        generator = torch.Generator("cuda").manual_seed(seed)
        return torch.rand(16, device="cuda", generator=generator).cpu()

    torch.manual_seed(0)
    expected = torch.rand(16, device="cuda").cpu()
    torch.manual_seed(0)
    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.rand(16, device="cuda").cpu(), expected)  # the default stream was not touched


def test_the_state_of_the_stream_can_be_put_back() -> None:
    state = torch.cuda.get_rng_state()
    first = torch.rand(16, device="cuda").cpu()
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(16, device="cuda").cpu(), first)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_a_recomputed_forward_draws_the_same_mask(use_reentrant: bool) -> None:
    def gradients(recompute: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 64), torch.nn.Dropout(0.5), torch.nn.Linear(64, 1)).to("cuda")
        x = randn(4, 8).to("cuda").requires_grad_()
        found = []
        for _ in range(3):
            y = checkpoint(model, x, use_reentrant=use_reentrant) if recompute else model(x)
            (grad,) = torch.autograd.grad(y.sum(), x) if not (recompute and use_reentrant) else (None,)
            if grad is None:
                x.grad = None
                y.sum().backward()
                grad = x.grad
            found.append(grad.cpu())
        return found

    assert_same(gradients(recompute=True), gradients(recompute=False))


# ---------------------------------------------------------------------- distributions


def on_accelerator(fill) -> torch.Tensor:
    return fill(torch.empty(N, device="cuda")).cpu()


@pytest.mark.parametrize(
    ("fill", "mean", "std"),
    [
        (lambda x: x.uniform_(), 0.5, 12**-0.5),
        (lambda x: x.uniform_(-2, 4), 1.0, 3**0.5),
        (lambda x: x.normal_(), 0.0, 1.0),
        (lambda x: x.normal_(3, 2), 3.0, 2.0),
        (lambda x: x.exponential_(2.0), 0.5, 0.5),
        (lambda x: x.bernoulli_(0.3), 0.3, 0.21**0.5),
        (lambda x: x.bernoulli_(torch.full_like(x, 0.3)), 0.3, 0.21**0.5),
        (lambda x: torch.bernoulli(torch.full_like(x, 0.3)), 0.3, 0.21**0.5),
        (lambda x: x.random_(0, 11), 5.0, 10**0.5),
        (lambda x: x.geometric_(0.5), 2.0, 2**0.5),
        (lambda x: x.log_normal_(0.0, 0.5), 1.1331, 0.6039),
        (lambda x: torch.normal(torch.ones_like(x), 2.0), 1.0, 2.0),
        (lambda x: torch.normal(1.0, torch.full_like(x, 2.0)), 1.0, 2.0),
        (lambda x: torch.normal(torch.ones_like(x), torch.full_like(x, 2.0)), 1.0, 2.0),
        (lambda x: torch.randn(N, device="cuda"), 0.0, 1.0),
        (lambda x: torch.rand_like(x), 0.5, 12**-0.5),
        (lambda x: torch.randint(0, 11, (N,), device="cuda").float(), 5.0, 10**0.5),
    ],
)
def test_mean_and_spread_are_those_of_the_distribution(fill, mean: float, std: float) -> None:
    x = on_accelerator(fill)
    assert x.mean().item() == pytest.approx(mean, abs=6 * std / N**0.5)
    assert x.std().item() == pytest.approx(std, rel=0.05)


def test_integers_cover_their_range_and_nothing_else() -> None:
    x = torch.randint(2, 6, (1000,), device="cuda")
    assert x.dtype == torch.int64
    assert set(x.tolist()) == {2, 3, 4, 5}


def test_a_permutation_has_every_number_once() -> None:
    x = torch.randperm(100, device="cuda")
    assert sorted(x.tolist()) == list(range(100))
    assert x.tolist() != list(range(100))


def test_multinomial_draws_by_weight() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0]).to("cuda")
    x = torch.multinomial(weights, 4000, replacement=True).cpu()
    assert (x == 0).sum() == 0
    assert (x == 2).float().mean().item() == pytest.approx(0.75, abs=0.04)


def test_attention_with_dropout_scales_what_it_keeps() -> None:
    q = torch.zeros(1, 1, 4, 256).to("cuda")
    v = torch.ones(1, 1, 256, 8).to("cuda")
    k = torch.zeros(1, 1, 256, 256).to("cuda")
    y = torch.nn.functional.scaled_dot_product_attention(q, k, v, dropout_p=0.5).cpu()
    assert y.mean().item() == pytest.approx(1.0, abs=0.25)
    assert not torch.equal(y, torch.ones_like(y))


@on_the_host_or_not
def test_a_random_value_that_was_read_is_the_one_that_is_computed_with(capture: Observed) -> None:
    x = torch.rand(4, device="cuda")
    read = x.tolist()
    assert (x * 2).tolist() == [2 * v for v in read]
    assert capture.recorder.stats.segments > 0  # only the devices draw: a GPU's numbers are not the host's
