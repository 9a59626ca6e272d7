"""The benchmarks run, at their smallest, and their files say what their documentation promises."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import capture, peers, results
from benchmarks.child import Child
from benchmarks.training import IGNORED, Corpus


def test_quartiles_of_one_value_are_that_value() -> None:
    assert results.quartiles([2.0]) == {"median": 2.0, "q25": 2.0, "q75": 2.0}


def test_quartiles_lie_between_the_values() -> None:
    assert results.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "q25": 2.0, "q75": 4.0}


def test_the_halves_of_a_batch_count_different_numbers_of_labels() -> None:
    tokens, labels = Corpus(peers.SMALL).batch(3)
    assert tokens.shape == labels.shape == (peers.SMALL.batch, peers.SMALL.seq)
    first, second = ((half != IGNORED).sum().item() for half in labels.chunk(2))
    assert first > second > 0


def test_batches_differ_and_are_the_same_in_every_process() -> None:
    a, b = Corpus(peers.SMALL), Corpus(peers.SMALL)
    assert a.batch(1)[0].equal(b.batch(1)[0])
    assert not a.batch(1)[0].equal(a.batch(2)[0])


def test_ratios_are_taken_round_by_round_without_the_warm_up() -> None:
    warm_up = [9.0] * peers.WARM_UP_ROUNDS
    figures = peers.summarize(
        {
            "plain": team("plain", [*warm_up, 1.0, 2.0], loss=4.0),
            "moai": team("moai", [*warm_up, 2.0, 4.0], loss=4.5),
            "moai_foreach": team("moai_foreach", [*warm_up, 3.0, 6.0], loss=4.0),
        }
    )
    assert figures["ratios"]["plain"] == {"median": 2.0, "q25": 2.0, "q75": 2.0}
    assert figures["foreach_ratios"]["moai"]["median"] == 1.5
    assert figures["step_s"]["moai"]["median"] == 3.0
    assert figures["loss_error"] == {"moai": 0.5, "moai_foreach": 0.0}


def test_every_row_of_the_peers_table_has_a_cell_for_each_column() -> None:
    teams = {name: team(name, [1.0] * (peers.WARM_UP_ROUNDS + 1), loss=4.0) for name in peers.VARIANTS}
    rows = peers.table(peers.summarize(teams) | {"others_cpu": 0.0}).split("\n\n")[0].splitlines()
    assert len(rows) == 2 + len(peers.VARIANTS)
    assert len({row.count("|") for row in rows}) == 1


def team(name: str, step_s: list[float], loss: float) -> peers.Team:
    """A team that has run."""
    return peers.Team(name, [], step_s, step_s, [loss] * len(step_s))


def test_an_error_in_a_child_is_reported_with_its_traceback() -> None:
    child = Child("the child", "benchmarks.capture:no_such_function", {}, os.environ)
    try:
        with pytest.raises(RuntimeError, match=r"(?s)the child failed.*no_such_function"):
            child.receive(60)
    finally:
        child.close()


def test_the_capture_benchmark_finds_that_steady_steps_record_nothing_anew(tmp_path: Path) -> None:
    figures = run(capture, tmp_path, "--layers", "2", "--runs", "1", "--steps", "8")
    assert figures["steady_recorded"] == 0
    assert figures["graphs_until_steady"] <= 4
    assert figures["ops_per_step"] > 100
    assert 0 < figures["replay_us_per_op"]["median"] < figures["first_us_per_op"]["median"]
    assert 0 < figures["host_share"]["median"] < 1


@pytest.mark.slow
def test_the_peers_benchmark_finds_that_our_losses_are_exact_and_data_parallel_ones_are_not(tmp_path: Path) -> None:
    figures = run(peers, tmp_path, "--small", "--rounds", "2", "--steps", "2")
    assert set(figures["ratios"]) == set(peers.VARIANTS) - {"moai"}
    assert all(math.isfinite(r["median"]) and r["median"] > 0 for r in figures["ratios"].values())
    assert figures["loss_error"]["moai"] < 1e-5
    assert figures["loss_error"]["moai_foreach"] < 1e-5
    assert figures["loss_error"]["ddp_fused"] > 1e-3


def run(benchmark: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    """The figures that a benchmark writes."""
    path = folder / "figures.json"
    benchmark.main(["--json", str(path), *arguments])
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures
