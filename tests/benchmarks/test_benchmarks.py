"""The benchmarks run, at their smallest, and their files say what their documentation promises."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks import capture, compile_time, generation, results
from benchmarks.child import Child
from benchmarks.peers import __main__ as peers
from benchmarks.peers import report
from benchmarks.peers.teams import WARM_UP_ROUNDS, Team, take_turns
from benchmarks.peers.variants import COMPARISONS, EXACT, VARIANTS, is_ours
from benchmarks.training import IGNORED, SMALL, Corpus


def test_quartiles_of_one_value_are_that_value() -> None:
    assert results.quartiles([2.0]) == {"median": 2.0, "q25": 2.0, "q75": 2.0}


def test_quartiles_lie_between_the_values() -> None:
    assert results.quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == {"median": 3.0, "q25": 2.0, "q75": 4.0}


def test_the_halves_of_a_batch_count_different_numbers_of_labels() -> None:
    tokens, labels = Corpus(SMALL).batch(3)
    assert tokens.shape == labels.shape == (SMALL.batch, SMALL.seq)
    first, second = ((half != IGNORED).sum().item() for half in labels.chunk(2))
    assert first > second > 0


def test_batches_differ_and_are_the_same_in_every_process() -> None:
    a, b = Corpus(SMALL), Corpus(SMALL)
    assert a.batch(1)[0].equal(b.batch(1)[0])
    assert not a.batch(1)[0].equal(a.batch(2)[0])


def test_an_even_corpus_ignores_no_label() -> None:
    tokens, labels = Corpus(SMALL, even=True).batch(3)
    assert labels.equal(tokens)


@pytest.mark.parametrize("names", COMPARISONS.values(), ids=COMPARISONS)
def test_a_comparison_has_exact_losses_a_peer_and_ours(names: tuple[str, ...]) -> None:
    assert set(names) <= set(VARIANTS)
    assert names[0] == EXACT
    assert {is_ours(name) for name in names[1:]} == {True, False}


def test_our_variants_differ_in_their_environment_alone() -> None:
    for name, variant in VARIANTS.items():
        assert variant.environment.keys() == ({"MOAI_PLAN", "MOAI_COMPILE"} if is_ours(name) else set())
        assert not (is_ours(name) and variant.spread)


WARM_UP = [9.0] * WARM_UP_ROUNDS


def test_ratios_are_taken_round_by_round_without_the_warm_up() -> None:
    teams = {"plain": team("plain", [*WARM_UP, 1.0, 2.0], loss=4.0), "moai": team("moai", [*WARM_UP, 2.0, 4.0], 4.5)}
    figures = report.summarize(teams, steps=3)
    assert figures["ratios"] == {"moai": {"plain": {"median": 2.0, "q25": 2.0, "q75": 2.0}}}
    assert figures["variants"]["moai"]["step_s"]["median"] == 3.0
    assert figures["variants"]["moai"]["loss_error"] == 0.5


def test_what_the_warm_up_took_beyond_later_steps_is_the_start() -> None:
    assert team("moai", [*WARM_UP, 1.0, 3.0], loss=4.0).start_s(steps=5) == WARM_UP_ROUNDS * (9.0 - 2.0) * 5


def test_a_variant_that_failed_is_said_beside_the_figures_of_the_others() -> None:
    teams = {name: team(name, [*WARM_UP, 1.0], loss=4.0) for name in ("plain", "ddp_fused", "moai")}
    teams["moai"].failure = "moai, process 0 failed\nRuntimeError: no such plan"
    figures = report.summarize(teams, steps=1)
    assert figures["variants"].keys() == {"plain", "ddp_fused"}
    assert "moai failed: RuntimeError: no such plan" in report.table(figures | {"others_cpu": 0.0})


def test_nothing_is_reported_if_there_are_no_exact_losses() -> None:
    teams = {name: team(name, [*WARM_UP, 1.0], loss=4.0) for name in ("plain", "moai")}
    teams["plain"].failure = "killed"
    with pytest.raises(RuntimeError, match="nothing to compare with: killed"):
        report.summarize(teams, steps=1)


def test_a_team_whose_process_fails_ends_and_says_why(tmp_path: Path) -> None:
    child = Child("the child", "benchmarks.capture:no_such_function", {}, os.environ)
    broken = Team("moai", tmp_path, [child])
    broken.run_block(1)
    assert broken.failure is not None and "no_such_function" in broken.failure
    assert not broken.children
    broken.run_block(1)
    assert broken.step_s == []


def test_every_row_of_the_tables_has_a_cell_for_each_column() -> None:
    for names in COMPARISONS.values():
        teams = {name: team(name, [*WARM_UP, 1.0], loss=4.0) for name in names}
        variants, ratios, _ = report.table(report.summarize(teams, steps=1) | {"others_cpu": 0.0}).split("\n\n")
        assert len(variants.splitlines()) == 2 + len(names)
        for rows in (variants, ratios):
            assert len({row.count("|") for row in rows.splitlines()}) == 1


def team(name: str, step_s: list[float], loss: float) -> Team:
    """A team that has run."""
    return Team(name, Path(), [], step_s, step_s, [loss] * len(step_s))


def test_compile_times_stand_by_depth_and_cache() -> None:
    waits = {"moai_compiled": {"6": {"cold": 27.0, "warm": 6.0}, "12": {"cold": 28.0, "warm": 7.0}}}
    text = compile_time.table({"wait_s": waits, "failures": {}, "layers": ["6", "12"], "others_cpu": 0.0})
    assert "| 6 layers, cold | 6 layers, warm | 12 layers, cold | 12 layers, warm |" in text
    assert "| moai_compiled | 27.0 | 6.0 | 28.0 | 7.0 |" in text


def test_an_error_in_a_child_is_reported_with_its_traceback() -> None:
    child = Child("the child", "benchmarks.capture:no_such_function", {}, os.environ)
    try:
        with pytest.raises(RuntimeError, match=r"(?s)the child failed.*no_such_function"):
            child.receive(60)
    finally:
        child.close()


@pytest.mark.slow
def test_the_capture_benchmark_finds_that_steady_steps_record_nothing_anew(tmp_path: Path) -> None:
    figures = run(capture, tmp_path, "--layers", "2", "--runs", "1", "--steps", "8")
    assert figures["steady_recorded"] == 0
    assert figures["graphs_until_steady"] <= 4
    assert figures["ops_per_step"] > 100
    assert 0 < figures["replay_us_per_op"]["median"] < figures["first_us_per_op"]["median"]
    assert 0 < figures["host_share"]["median"] < 1


PEERS = ("ddp_fused", "ddp_parts", "ddp_checkpointed", "fsdp2", "fsdp2_once", "tp", "tp_sequence")


@pytest.mark.slow
def test_every_peer_trains_the_same_model_on_the_same_batches() -> None:
    teams = take_turns((EXACT, *PEERS), SMALL, even=True, rounds=1, steps=2)
    figures = report.summarize(teams, steps=2)
    assert figures["failures"] == {}
    assert {name: each["loss_error"] for name, each in figures["variants"].items() if each["loss_error"] > 1e-5} == {}


@pytest.mark.slow
def test_the_peers_benchmark_finds_that_our_losses_are_exact_and_data_parallel_ones_are_not(tmp_path: Path) -> None:
    figures = run(peers, tmp_path, "--small", "--rounds", "2", "--steps", "2", "--compare", "dp")["dp"]
    assert figures["failures"] == {}
    assert figures["ratios"].keys() == {"moai", "moai_foreach"}
    assert figures["ratios"]["moai"].keys() == {"plain", "ddp_foreach", "ddp_fused"}
    assert all(math.isfinite(r["median"]) and r["median"] > 0 for r in figures["ratios"]["moai"].values())
    assert all(each["peak_bytes"] > 2**20 for each in figures["variants"].values())
    errors = {name: each["loss_error"] for name, each in figures["variants"].items()}
    assert errors["moai"] < 1e-5
    assert errors["moai_foreach"] < 1e-5
    assert errors["ddp_fused"] > 1e-3


def run(benchmark: Any, folder: Path, *arguments: str) -> dict[str, Any]:
    """The figures that a benchmark writes."""
    path = folder / "figures.json"
    benchmark.main(["--json", str(path), *arguments])
    figures: dict[str, Any] = json.loads(path.read_text())
    return figures


@pytest.mark.slow
def test_generation_says_what_a_token_takes_beside_pytorch(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generation.main(["--small", "--json", str(tmp_path / "generation.json")])
    figures = json.loads((tmp_path / "generation.json").read_text())
    (peers,) = figures["sizes"].values()
    assert list(peers) == ["PyTorch", "MoAI, 1 worker", "MoAI, 2 workers"]
    assert all(peer["ms"]["median"] > 0 and peer["ratio"]["median"] > 0 for peer in peers.values())
    assert "times PyTorch's" in capsys.readouterr().out
