"""What the planner chooses within a budget of memory fits the devices, as workers count it."""

from __future__ import annotations

import pytest

from benchmarks import fits


@pytest.mark.slow
def test_no_plan_that_is_chosen_runs_out_of_memory() -> None:
    found = list(fits.trials(16, seed=2, budgets=8))
    run = [trial for trial in found if trial.plan is not None]
    assert len(run) >= 10
    assert len({trial.plan for trial in run}) > 3
    assert all(trial.counted for trial in run)
    assert not [trial for trial in run if trial.fails]
