"""The report of numerics: which plans it compares, and what it calls a difference."""

from __future__ import annotations

from dataclasses import astuple, replace
from itertools import combinations

import pytest
import torch

from benchmarks.numerics import plans, report, run
from benchmarks.numerics.plans import Point
from benchmarks.numerics.run import Row
from benchmarks.numerics.script import Case, Training, batches


def training(loss: float = 4.0, norm: float = 1.0, weight: float = 0.5) -> Training:
    steps = torch.ones(3, dtype=torch.float64)
    return Training(steps * loss, steps * norm, {"weight": torch.full((2,), weight), "bias": torch.zeros(2)})


def pairs_of(points: list[Point]) -> set[object]:
    return {pair for p in points for pair in combinations(enumerate(astuple(p)), 2)}


def test_all_pairs_of_settings_occur_in_few_plans() -> None:
    chosen = plans.pairs(4)
    assert pairs_of(chosen) == pairs_of(plans.every(4))
    assert len(chosen) <= 16


def test_the_plans_are_the_same_every_time() -> None:
    assert plans.pairs(4) == plans.pairs(4)


def test_no_plan_has_more_devices_than_there_may_be() -> None:
    assert {p.n_devices for p in plans.every(2)} == {1, 2}
    assert {p.n_devices for p in plans.parse_all(["kinds", "pairs"], 2)} == {1, 2}


def test_a_plan_is_read_as_it_is_written() -> None:
    assert [Point.parse(str(point)) for point in plans.every(4)] == plans.every(4)


def test_a_setting_that_is_not_compared_is_named() -> None:
    with pytest.raises(ValueError, match=r"is no plan of this report: it has shard"):
        Point.parse("dp=2,distribute_param=true,shard=2")


def test_no_number_of_parts_divides_the_batch() -> None:
    for point in plans.every(4):
        parts = point.dp * point.micro
        assert point.batch >= parts
        assert parts == 1 or point.batch % parts


def test_samples_count_different_numbers_of_labels() -> None:
    counts = [(labels != -100).sum(1) for _, _, labels in batches(Case("llama", "fp32", 7, 4))]
    assert all(len(set(c.tolist())) > 2 and 0 in c for c in counts)
    assert not counts[0].equal(counts[1])


def test_equal_numbers_do_not_differ() -> None:
    assert run.differences(training(), training()) == (0, 0, 0)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (training(loss=4.4), (0.1, 0, 0)),
        (training(norm=0.9), (0, 0.1, 0)),
        (training(weight=0.55), (0, 0, 0.1)),
    ],
)
def test_a_difference_is_relative_to_what_it_should_be(changed: Training, expected: tuple[float, ...]) -> None:
    assert run.differences(changed, training()) == pytest.approx(expected, rel=1e-5)


def test_what_is_no_number_differs() -> None:
    point, known = Point.parse("dp=2"), _Known({"fp32": training()})
    assert run.compare(known, point, "llama", training(loss=float("nan")), 3).outcome == "differs"
    assert run.compare(known, point, "llama", training(), 3).outcome == "same"


def test_a_bf16_plan_is_measured_by_the_error_of_bf16() -> None:
    exact, bf16, plan = training(4.0, 1.0, 0.5), training(4.1, 1.1, 0.6), training(4.05, 0.9, 0.6)
    assert run.distances(plan, bf16, exact) == pytest.approx((0.5, 2, 0), abs=1e-5)


def test_a_bf16_plan_that_computes_in_fp32_is_noticed() -> None:
    references = {"fp32": training(4.0, 1.0, 0.5), "bf16": training(4.1, 1.1, 0.6)}
    point = Point.parse("dp=2,precision=bf16")
    row = run.compare(_Known(references), point, "llama", references["fp32"], 3)
    assert (row.outcome, row.reason) == ("failed", "the numbers are those of fp32: nothing was computed in bf16.")
    assert run.compare(_Known(references), point, "llama", references["bf16"], 3).outcome == "same"


def test_a_refused_plan_is_a_row_with_its_reason_and_no_failure() -> None:
    row = run.compare(_Known({}), Point.parse("tp=4"), "llama", "PlanError: tp=4 does not divide 3.", 3)
    assert (row.outcome, row.reason) == ("refused", "tp=4 does not divide 3.")
    assert "- llama, `dp=1,tp=4,precision=fp32`, refused: tp=4 does not divide 3." in report.tables([row])


def test_a_failure_is_no_refusal() -> None:
    row = run.compare(_Known({}), Point.parse("dp=2"), "llama", "RuntimeError: device 0 failed", 3)
    assert row.outcome == "failed"


def test_a_cell_shows_the_worst_of_a_comparison_and_whether_it_is_too_much() -> None:
    row = Row(Point.parse("dp=2"), "llama", "same", (1e-7, 3e-6, 0))
    assert report.cell(row) == "3e-06"
    assert report.cell(replace(row, outcome="differs")) == "**3e-06**"


def test_every_row_of_a_table_has_a_cell_for_each_model() -> None:
    rows = [Row(Point.parse(f"dp={n}"), m, "same", (0.0,) * 3) for n in (1, 2) for m in ("plain", "llama")]
    lines = [line for line in report.tables(rows).splitlines() if line.startswith("|")]
    assert len(lines) == 4 and len({line.count("|") for line in lines}) == 1


class _Known:
    """A runner whose references are known, by precision."""

    def __init__(self, references: dict[str, Training]) -> None:
        self._references = references

    def reference(self, case: Case) -> Training:
        return self._references[case.precision]
