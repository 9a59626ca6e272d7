"""A step that almost repeats an earlier one is never mistaken for it."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import pytest
import torch

from tests.capture.compare import assert_same, randn
from tests.capture.conftest import Observed

# ---------------------------------------------------------------------- one change at a time


@dataclass(frozen=True)
class Step:
    """`kind` of operation on members `a` and `b` of the pool, with a small integer and a float."""

    kind: str
    a: int
    b: int
    n: int
    f: float


@dataclass(frozen=True)
class World:
    """What the program starts from."""

    rows: int = 6
    dtype: torch.dtype = torch.float32
    shared: bool = False  # the second tensor is a view of the first
    transposed: bool = False  # the first tensor lies column by column

    def pool(self, device: str) -> list[torch.Tensor]:
        tensors = [randn(self.rows, 6, seed=i).to(self.dtype).to(device) for i in range(4)]
        if self.transposed:
            tensors[0] = tensors[0].t().contiguous().t()
        if self.shared:
            tensors[1] = tensors[0].view(self.rows, 6)
        return tensors


KINDS = ("mul", "alpha", "plus", "scale_", "rows_", "row_", "cat", "roll", "foreach_", "clamp_", "addcmul", "new_zeros")


def random_program(r: random.Random) -> list[Step]:
    return [
        Step(r.choice(KINDS), r.randrange(100), r.randrange(100), r.randrange(1, 5), round(r.random(), 2))
        for _ in range(r.randint(4, 12))
    ]


def run(program: list[Step], world: World, device: str) -> list[torch.Tensor]:
    pool = world.pool(device)
    for step in program:
        x, y, n, f = pool[step.a % len(pool)], pool[step.b % len(pool)], step.n, step.f
        if step.kind == "mul":
            pool.append(x * y)
        elif step.kind == "alpha":
            pool.append(torch.add(x, y, alpha=n))
        elif step.kind == "plus":
            pool.append(x + f)
        elif step.kind == "scale_":
            x.mul_(f)
        elif step.kind == "rows_":
            x[n:].add_(n)
        elif step.kind == "row_":
            x[n] = f
        elif step.kind == "cat":
            pool.append(torch.cat([x[:n], y[n:]]))
        elif step.kind == "roll":
            pool.append(x.roll(n, 0) + y)
        elif step.kind == "foreach_":
            torch._foreach_add_([x, y] if x is not y else [x], f)
        elif step.kind == "clamp_":
            x.clamp_(-n, n)
        elif step.kind == "addcmul":
            pool.append(torch.addcmul(x, x, y, value=f))
        elif step.kind == "new_zeros":
            pool.append(torch.zeros_like(x).add_(y, alpha=n))
    return [t.cpu().clone() for t in pool]


def changed(program: list[Step], r: random.Random) -> list[Step]:
    """The program with one operand or constant of one step changed."""
    i = r.randrange(len(program))
    change = r.choice(
        [{"a": r.randrange(100)}, {"b": r.randrange(100)}, {"n": r.randrange(1, 5)}, {"f": round(r.random(), 2)}]
    )
    return [*program[:i], replace(program[i], **change), *program[i + 1 :]]


OTHER_WORLDS = [World(rows=7), World(dtype=torch.float64), World(shared=True), World(transposed=True)]


@pytest.mark.parametrize("seed", range(60))
def test_a_program_with_one_thing_changed_is_not_taken_for_the_one_before(seed: int) -> None:
    r = random.Random(seed)
    program, world = random_program(r), World()
    variants = [(changed(program, r), world) for _ in range(4)] + [(program, other) for other in OTHER_WORLDS]
    for variant in [(program, world)] * 2 + [v for near in variants for v in (near, (program, world))]:
        assert_same(run(*variant, "cuda"), run(*variant, "cpu"), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- each thing that can differ, by name


def cuda(*size: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return randn(*size, seed=seed).to(dtype).to("cuda")


def test_the_same_step_is_replayed_whole(capture: Observed) -> None:
    def step() -> float:
        return (cuda(3, 4) @ cuda(4, 5, seed=1)).relu().sum().item()

    first = step()
    recorded = capture.recorder.stats.recorded
    assert step() == first
    assert capture.recorder.stats.recorded == recorded


def test_an_operand_that_was_another_tensor_is_noticed() -> None:
    x, y, z = cuda(3), cuda(3, seed=1), cuda(3, seed=2)
    for a, b in ((x, y), (x, z), (x, x), (y, x)):
        product = torch.stack([a * 1.0, x * 1.0, y * 1.0, z * 1.0, a * b])[-1]
        assert_same(product, a.cpu() * b.cpu())


def test_an_operand_that_is_another_view_of_the_same_tensor_is_noticed() -> None:
    x = cuda(4, 4)
    for view in (x, x.t(), x.flip(0), x[:, :2], x[:, 2:], x[:1].expand(4, 4), x.diagonal()):
        assert_same(view + 1, view.cpu() + 1)


def test_storages_of_another_layout_are_noticed() -> None:
    """The same window, but the rest of the storage, which a write through another view reaches, is laid out
    otherwise."""
    for rows in (2, 3):
        base = cuda(rows, 4)
        first = base[0]
        first.add_(1)
        assert_same(base.sum(), (randn(rows, 4) + torch.tensor([[1.0]] + [[0.0]] * (rows - 1))).sum())


def test_an_in_place_change_of_one_or_of_two_tensors_is_noticed() -> None:
    for shared in (False, True, False):
        x = cuda(3)
        y = x.view(3) if shared else cuda(3)
        x.add_(1)
        assert_same(y * 2, ((randn(3) + 1) if shared else randn(3)) * 2)


def test_a_constant_of_another_type_is_noticed() -> None:
    x = torch.tensor([3, 4, 5]).to("cuda")
    for number in (2, 2.0, True, 2):
        got, expected = x * number, x.cpu() * number
        assert got.dtype == expected.dtype
        assert_same(got, expected)


def test_a_dtype_argument_is_noticed() -> None:
    x = cuda(3)
    for dtype in (torch.float64, torch.bfloat16, torch.float64):
        assert_same(x.to(dtype).sum(), x.cpu().to(dtype).sum())


def test_a_keyword_argument_that_is_absent_is_noticed() -> None:
    x, y = cuda(3), cuda(3, seed=1)
    for kwargs in ({}, {"alpha": 2}, {"alpha": 3}, {}):
        assert_same(torch.add(x, y, **kwargs), torch.add(x.cpu(), y.cpu(), **kwargs))


def test_lists_of_other_lengths_are_noticed() -> None:
    tensors = [cuda(3, seed=i) for i in range(4)]
    for n in (2, 3, 4, 2):
        assert_same(torch.cat(tensors[:n]), torch.cat([t.cpu() for t in tensors[:n]]))


def test_an_optional_tensor_that_is_absent_is_noticed() -> None:
    x, weight, bias = cuda(2, 4), cuda(4, seed=1), cuda(4, seed=2)
    for w, b in ((weight, bias), (weight, None), (None, None), (weight, bias)):
        expected = torch.layer_norm(x.cpu(), (4,), None if w is None else w.cpu(), None if b is None else b.cpu())
        assert_same(torch.layer_norm(x, (4,), w, b), expected)


def test_a_tensor_on_the_cpu_where_one_on_the_accelerator_was_is_noticed() -> None:
    x = cuda(3)
    for scale in (torch.tensor(2.0).to("cuda"), torch.tensor(3.0), torch.tensor(4.0)):
        assert_same(x * scale, x.cpu() * scale.cpu())


def test_what_a_failed_match_took_in_is_given_back() -> None:
    """The first operand fits, the second does not: the first must still be an input of the segment, once."""
    x, y, z = cuda(3), cuda(3, seed=1), cuda(4, seed=2)
    assert_same(torch.cat([x, y]), torch.cat([x.cpu(), y.cpu()]))
    assert_same(torch.cat([x, z]), torch.cat([x.cpu(), z.cpu()]))
    both = torch.cat([x, z]) * 2
    assert_same(both, torch.cat([x.cpu(), z.cpu()]) * 2)


def test_memory_that_was_filled_this_time_is_noticed() -> None:
    for filled in (False, True, False):
        x = torch.empty(3, device="cuda")
        if filled:
            x.copy_(randn(3))
        assert_same(x + 1, randn(3) + 1 if filled else torch.ones(3))


def test_a_number_that_a_failed_match_took_in_is_given_back() -> None:
    x = cuda(6)
    for low, high, scale in ((-0.1, 1.0, 2.0), (-0.2, 1.0, 3.0), (-0.3, 1.0, 4.0), (-0.4, 2, 5.0), (-0.5, 2, 6.0)):
        got = torch.nn.functional.hardtanh(x, low, high) * scale
        assert_same(got, torch.nn.functional.hardtanh(x.cpu(), low, high) * scale)


# ---------------------------------------------------------------------- floats


def test_a_float_that_changes_every_step_becomes_an_input(capture: Observed) -> None:
    for i in range(8):
        x = cuda(3)
        assert_same(x * (0.1 + i), randn(3) * (0.1 + i))
    assert len(capture.graphs) == 2
    assert [graph.n_scalars for graph in capture.graphs] == [0, 1]


def test_each_float_that_changes_becomes_an_input_of_its_own(capture: Observed) -> None:
    for i in range(6):
        x = cuda(3)
        x.mul_(0.5 + i).add_(0.25)
        x.clamp_(-1.5 - i, 1.5)
        assert_same(x, (randn(3) * (0.5 + i) + 0.25).clamp(-1.5 - i, 1.5))
    assert len(capture.graphs) <= 3
    assert capture.graphs[-1].n_scalars == 2


def test_floats_of_an_optimizer_are_inputs_from_the_first_step(capture: Observed) -> None:
    model = torch.nn.Linear(3, 3).to("cuda")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for i in range(6):
        loss = model(cuda(2, 3, seed=i)).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        loss.item()
    assert len(capture.graphs) == 2  # the first step makes the optimizer's state


def test_not_a_number_is_a_constant_like_any_other(capture: Observed) -> None:
    for _ in range(3):
        x = cuda(3).masked_fill_(cuda(3) > 0, float("nan"))
        assert_same(x, randn(3).masked_fill_(randn(3) > 0, float("nan")))
    assert len(capture.graphs) == 1


def test_integers_stay_constants(capture: Observed) -> None:
    for n in (1, 2, 3):
        assert_same(cuda(6).roll(n, 0), randn(6).roll(n, 0))
    assert len(capture.graphs) == 3


def test_scripts_that_alternate_replay_both_ways(capture: Observed) -> None:
    def step(i: int) -> None:
        x = cuda(4)
        y = x.relu() if i % 2 else x.tanh()
        assert_same(y * 2, (randn(4).relu() if i % 2 else randn(4).tanh()) * 2)

    step(0), step(1)
    recorded, graphs = capture.recorder.stats.recorded, len(capture.graphs)
    for i in range(2, 8):
        step(i)
    assert (capture.recorder.stats.recorded, len(capture.graphs)) == (recorded, graphs)
