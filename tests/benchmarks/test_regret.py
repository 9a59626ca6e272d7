"""The figures of the regret benchmark."""

from __future__ import annotations

import pytest

from benchmarks import regret
from moai.plan.parse import parse


def test_the_rank_correlation_sees_the_order_alone() -> None:
    assert regret.spearman([1.0, 2.0, 3.0], [1.0, 10.0, 11.0]) == pytest.approx(1.0)
    assert regret.spearman([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1.0)
    assert regret.spearman([1.0], [2.0]) == 1.0


def test_every_plan_that_can_be_run_is_measured_once() -> None:
    found = list(regret.plans(2, 4, 4))
    # dp=2 with 1 or 2 micro-batches, tp=2 with 1, 2 or 4, pp=2 with 2 or 4 in four orders
    assert len(found) == len(set(found)) == 2 * 9 + 3 * 3 + 2 * 3 * 4
    assert all(plan.n_devices == 2 for plan in found)


def test_what_is_lost_is_summed_over_models() -> None:
    one = {how: {"regret": 1.25, "rank": 0.5, "error": 0.1} for how in regret.HOW}
    two = {**one, "layers": {"regret": 1.0, "rank": 1.0, "error": 0.3}}
    layers, *others = regret.pooled({"a": one, "b": two}).splitlines()[2:]
    assert layers == "| layers | 0.250 | 0.75 | 20% |"
    assert all("| 0.500 | 0.50 | 10% |" in row for row in others)


def test_regret_is_the_chosen_plans_time_over_the_fastest_ones() -> None:
    a, b = parse("dp=2", 2), parse("tp=2", 2)
    found = regret.summary(a, {a: 1.0, b: 2.0}, {a: 3.0, b: 2.0})
    assert (found["best"], found["regret"], found["rank"]) == (str(b), 1.5, pytest.approx(-1.0))
    assert found["error"] == pytest.approx((2 / 3 + 0) / 2)
