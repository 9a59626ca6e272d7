"""Every kind of plan trains as one device does: losses, norms of gradients, parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from benchmarks.numerics.__main__ import rows_of
from benchmarks.numerics.models import MODELS
from benchmarks.numerics.plans import KINDS, Point, pairs
from benchmarks.numerics.run import Row, Runner, applies, case_of

STEPS = 4
FEW = ("plain", "dropout", "llama", "gpt2")
# All settings at once, on four devices.
ALL = "dp=2,tp=2,micro=4,recompute=default,distribute_param=true,distribute_low_prec_param=true"

Compare = Callable[[Point, Sequence[str]], list[Row]]


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Compare:
    """(plan, models) -> the rows of their comparison with one device; what one device computes is computed once."""
    runner = Runner(tmp_path_factory.mktemp("numerics"))
    planned = [case_of(model, point, STEPS) for point in KINDS for model in FEW]
    runner.prepare(planned)

    def rows(point: Point, models: Sequence[str]) -> list[Row]:
        runner.prepare([case_of(model, point, STEPS) for model in models if applies(model, point)])
        return rows_of(runner, point, models, STEPS)

    return rows


def assert_same(rows: list[Row]) -> None:
    wrong = [(row.model, row.outcome, row.differences, row.reason) for row in rows if row.outcome != "same"]
    assert not wrong, wrong


@pytest.mark.parametrize("point", KINDS, ids=str)
def test_a_plan_trains_as_one_device(compare: Compare, point: Point) -> None:
    assert_same(compare(point, FEW))


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_every_model_trains_as_on_one_device(compare: Compare, precision: str) -> None:
    assert_same(compare(Point.parse(f"{ALL},precision={precision}"), tuple(MODELS)))


@pytest.mark.slow
@pytest.mark.parametrize("point", pairs(4), ids=str)
def test_every_pair_of_settings_trains_every_model_as_one_device(compare: Compare, point: Point) -> None:
    assert_same(compare(point, tuple(MODELS)))
