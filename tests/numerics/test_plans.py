"""Every kind of plan trains as one device does: losses, norms of gradients, parameters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from benchmarks.numerics.__main__ import rows_of
from benchmarks.numerics.models import MODELS
from benchmarks.numerics.plans import Point, parse_all
from benchmarks.numerics.run import Row, Runner, applies, case_of

STEPS = 3
FEW = ("plain", "gpt2")  # both stay in fp64, where nothing hides behind rounding
SETTINGS = (
    "dp=2,precision=fp64",
    "tp=2,precision=fp64",
    "micro=4,precision=fp64",
    "recompute=full,precision=fp64",
    "dp=2,distribute_param=true,precision=fp64",
    "dp=2,distribute_param=true,distribute_low_prec_param=true,precision=fp64",
    "pp=2,micro=4,precision=fp64",
    "dp=2,tp=2,distribute_param=true,distribute_low_prec_param=true,precision=bf16",
    "dp=2,pp=2,micro=4,recompute=full,distribute_param=true,distribute_low_prec_param=true,schedule=zero_bubble,precision=bf16",
)
ALL = "dp=2,tp=2,micro=4,recompute=default,distribute_param=true,distribute_low_prec_param=true,precision=fp64"

Compare = Callable[[Point, Sequence[str]], list[Row]]


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Compare:
    """(plan, models) -> the rows of their comparison with one device; what one device computes is computed once."""
    runner = Runner(tmp_path_factory.mktemp("numerics"))
    few = [case_of(model, Point.parse(text), STEPS) for text in SETTINGS for model in FEW]
    runner.prepare(few)

    def rows(point: Point, models: Sequence[str]) -> list[Row]:
        runner.prepare([case_of(model, point, STEPS) for model in models if applies(model, point)])
        return rows_of(runner, point, models, STEPS)

    return rows


def assert_same(rows: list[Row]) -> None:
    wrong = [(row.model, row.outcome, row.differences, row.reason) for row in rows if row.outcome != "same"]
    assert not wrong, wrong


# The others are those of the table of docs/numerics.md, and are tested together below.
QUICK = (SETTINGS[1], SETTINGS[5], SETTINGS[6])


@pytest.mark.parametrize("plan", [p if p in QUICK else pytest.param(p, marks=pytest.mark.slow) for p in SETTINGS])
def test_a_setting_trains_as_one_device(compare: Compare, plan: str) -> None:
    assert_same(compare(Point.parse(plan), FEW))


def test_all_settings_at_once_train_as_one_device(compare: Compare) -> None:
    assert_same(compare(Point.parse(ALL), (*FEW, "mixtral")))


@pytest.mark.slow
def test_all_settings_at_once_train_every_model_as_one_device(compare: Compare) -> None:
    assert_same(compare(Point.parse(ALL), tuple(MODELS)))


@pytest.mark.slow
@pytest.mark.parametrize("point", parse_all(["kinds", "pairs"], devices=4), ids=str)
def test_every_pair_of_settings_trains_every_model_as_one_device(compare: Compare, point: Point) -> None:
    assert_same(compare(point, tuple(MODELS)))
