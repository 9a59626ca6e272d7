"""Predictions against published runs: which rows are understood, how constants are calibrated, what is reported."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.child import ROOT
from benchmarks.published import __main__ as command
from benchmarks.published.calibrate import Calibration, at_bounds
from benchmarks.published.constants import fitted_to, shipped
from benchmarks.published.predicting import Outcome, Predictor
from benchmarks.published.report import memory_errors, regret, step_errors
from benchmarks.published.rows import read
from moai.plan.cluster import Constant
from moai.plan.cluster_file import names
from moai.plan.timings import GENERIC

DATA = ROOT.parent / "shared" / "data" / "published_runs.csv"

ROW = {
    "id": "A", "source": "somebody/something@1234 README.md", "hw": "A100-80GB x8", "model": "Llama",
    "layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "8", "ffn": "14336", "vocab": "128256", "seq": "8192",
    "gpus": "8", "dp": "8", "shard": "FSDP2", "tp": "1", "pp": "1", "mbs": "1", "gbs": "8", "precision": "bf16",
    "recompute": "full", "tok_s_gpu": "2000", "kind": "pretrain",
}  # fmt: skip


def rows(tmp_path, *changes):
    file = tmp_path / "rows.csv"
    with file.open("w", newline="") as opened:
        table = [{**ROW, "id": str(i), **change} for i, change in enumerate(changes)]
        writer = csv.DictWriter(opened, sorted({key for row in table for key in row}))
        writer.writeheader()
        writer.writerows(table)
    return file


def case(tmp_path, **change):
    cases, left_out = read(rows(tmp_path, change))
    assert not left_out
    return cases[0]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"layers": ""}, "layers is not stated"),
        ({"dp": ""}, "dp is not stated"),
        ({"hw": "Cerebras CS-3"}, "there is no description of the hardware 'Cerebras CS-3'"),
        ({"hw": ""}, "there is no description of the hardware ''"),
        ({"precision": "int3"}, "precision is not known"),
        ({"shard": "some"}, "shard is not known"),
        ({"recompute": "sometimes"}, "recompute is not known"),
        ({"ep": "8"}, "its experts' sizes are not stated"),
        ({"tp": "2"}, "do not make 8 devices"),
        ({"hidden": "many"}, "hidden is no number"),
        ({"hidden": "-1"}, "hidden is no quantity"),
        ({"heads": "0"}, "heads is no positive whole number"),
        ({"mbs": "3"}, "not made of whole micro-batches"),
        ({"mbs": "", "gbs": ""}, "neither gbs nor mbs is stated"),
        ({"tok_s_gpu": ""}, "no speed"),
        ({"note": "AutoParallel ILP"}, "a solver's"),
    ],
)
def test_a_row_that_does_not_say_enough_is_left_out_with_the_reason(tmp_path, change, reason):
    cases, left_out = read(rows(tmp_path, change))
    assert not cases
    assert reason in left_out["0"]


def test_columns_may_be_missing_or_more_than_known(tmp_path):
    file = tmp_path / "rows.csv"
    file.write_text("id,hw,more\nA,H100,x,y\nB\n")
    cases, left_out = read(file)
    assert not cases and set(left_out) == {"A", "B"}


def test_hardware_is_a_description_with_what_the_row_says_otherwise(tmp_path):
    assert case(tmp_path, hw="A100-80GB-SXM (Selene, 8xHDR200/node)").hardware == "a100-80"
    assert case(tmp_path, hw="A100 80GB, 8 a node, 4x HDR200").cluster.between.bandwidth == 4 * 200e9 / 8 / 8
    assert case(tmp_path, hw="V100-16GB AWS p3.16xlarge (25Gb/s)").cluster.between.bandwidth == 25e9 / 8 / 8
    assert case(tmp_path, hw="H100-96GB-HBM2e-2.4TB/s-500W, 400Gb/s/GPU").hardware == "h100-96"
    full, limited = (case(tmp_path, hw=text).cluster.device.peak["bf16"] for text in ("DGX-H100", "H100 350 W"))
    assert limited == pytest.approx(full * 0.5**0.5)


def test_the_step_is_what_was_measured_or_follows_from_the_tokens(tmp_path):
    assert case(tmp_path).step_s == pytest.approx(8 * 8192 / (8 * 2000))
    assert case(tmp_path, step_s="3.5").step_s == 3.5


def test_what_is_not_stated_is_read_in_every_way(tmp_path):
    found = case(tmp_path, recompute="", mbs="", gbs="16")
    assert found.unstated == ("mbs", "recompute")
    assert {(v.layout.samples, v.layout.recompute) for v in found.variants} >= {(1, "none"), (2, "full")}
    outcome = Predictor(found).outcome({})
    assert outcome.low_s == outcome.step_s < outcome.high_s


def test_a_frameworks_facts_hold_for_all_its_rows(tmp_path):
    assert not case(tmp_path, source="pytorch/torchtitan@1").stack.fused
    assert case(tmp_path, source="pytorch/torchtitan@1", compile="1").stack.fused
    piped = case(tmp_path, source="pytorch/torchtitan@1", dp="1", pp="8", mbs="16", gbs="16")
    assert [(v.layout.samples, v.layout.micro) for v in piped.variants] == [(2, 8)]


def predictors(tmp_path, factor):
    """Rows of several batches whose times are `factor` times those of the generic constants."""
    batches = ("1", "2", "4")
    cases, _ = read(rows(tmp_path, *({"hw": "MI300X", "gbs": b, "dp": "1", "gpus": "1", "mbs": b} for b in batches)))
    found = [Predictor(c) for c in cases]
    for predictor in found:
        time = predictor.outcome({}).step_s * factor
        predictor.case = replace(predictor.case, step_s=time)
    return found


def test_calibration_follows_the_rows_and_names_their_source(tmp_path):
    found = predictors(tmp_path, 1.2)
    constants = Calibration(found).constants("mi300x")
    assert fitted_to(constants) == {"somebody/something"}
    assert step_errors([(p.case, p.outcome(constants)) for p in found])["median"] < 0.05


def test_calibration_gives_the_same_for_the_same_rows(tmp_path):
    assert Calibration(predictors(tmp_path, 1.2)).every() == Calibration(predictors(tmp_path, 1.2)).every()


def test_calibration_without_a_source_does_not_see_its_rows(tmp_path):
    found = predictors(tmp_path, 1.2)
    assert not fitted_to(Calibration(found).constants("mi300x", "somebody/something"))


def test_constants_stay_within_what_is_possible(tmp_path):
    for factor in (0.1, 0.7, 2.0, 10.0):
        constants = Calibration(predictors(tmp_path, factor)).constants("mi300x")
        assert all(c.low <= c.value <= c.high for c in constants.values())


def test_constants_at_a_bound_are_named():
    free, bound = Constant(0.5, "fitted", 0.0, 1.0), Constant(1.0, "fitted", 0.0, 1.0)
    assert at_bounds({"h100": {"stream": free, "matmul": bound}}) == ["h100: matmul"]


@pytest.mark.parametrize("name", names())
def test_constants_of_the_cluster_files_are_known_and_say_where_they_are_from(name):
    for key, constant in shipped(name).items():
        assert key in GENERIC
        assert constant.source and constant.low <= constant.value <= constant.high


def test_errors_are_relative_and_the_bias_keeps_their_sign(tmp_path):
    one = case(tmp_path, step_s="1")
    predicted = [(one, Outcome(step_s, 0.0, step_s, step_s)) for step_s in (0.9, 1.0, 1.3)]
    found = step_errors(predicted)
    assert found["n"] == 3
    assert found["median"] == pytest.approx(0.1)
    assert found["bias"] == pytest.approx(0.2 / 3)


def test_memory_counts_only_where_its_metric_is_known(tmp_path):
    unknown = case(tmp_path, mem_gib="10")
    known = case(tmp_path, mem_gib="10", note="max_allocated")
    outcome = Outcome(1.0, 8 * 2**30, 1.0, 1.0)
    assert memory_errors([(unknown, outcome)]) is None
    assert memory_errors([(unknown, outcome), (known, outcome)])["under"] == 1.0


def test_regret_is_of_the_plan_that_was_predicted_to_be_the_fastest(tmp_path):
    file = rows(tmp_path, {"step_s": "2"}, {"dp": "4", "tp": "2", "step_s": "1"}, {"step_s": "5", "seq": "1024"})
    cases, _ = read(file)
    found = regret([(c, Outcome(t, 0.0, t, t)) for c, t in zip(cases, (1.0, 1.5, 1.0), strict=True)])
    assert found == {"groups": 1, "mean": 1.0, "p90": 1.0, "worst": 1.0, "top_three": 1.0}


def test_of_plans_that_are_not_told_apart_the_one_with_the_fewest_stages_is_chosen(tmp_path):
    file = rows(tmp_path, {"step_s": "1"}, {"dp": "4", "pp": "2", "step_s": "2"})
    cases, _ = read(file)
    for staged, expected in ((0.99, 0.0), (0.97, 1.0)):
        found = regret([(c, Outcome(t, 0.0, t, t)) for c, t in zip(cases, (1.0, staged), strict=True)])
        assert found is not None and found["mean"] == expected


def test_the_command_prints_json(tmp_path, monkeypatch, capsys):
    file = rows(tmp_path, {}, {"hw": "?"})
    monkeypatch.setattr(sys, "argv", ["published", "--csv", str(file), "--json"])
    assert command.main() == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["rows"], found["predicted"], list(found["left_out"])) == (2, 1, ["1"])
    assert found["figures"]["all"]["step"]["n"] == 1
    assert found["figures"]["somebody/something, a100-80"]["source_left_out"]["step"]["n"] == 1


def test_a_file_without_a_row_that_can_be_predicted_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["published", "--csv", str(rows(tmp_path, {"hw": "?"}))])
    assert command.main() == 1
    assert "there is no description of the hardware '?'" in capsys.readouterr().err


@pytest.mark.skipif(not DATA.is_file(), reason="the published runs are not beside the repository")
def test_published_runs_are_predicted_about_as_well_as_when_the_constants_were_fitted():
    cases, left_out = read(Path(DATA))
    assert len(cases) > 1100 and len(cases) + len(left_out) == 1324
    few = [c for i, c in enumerate(cases) if i % 8 == 0]
    constants: dict[str, dict[str, Constant]] = {}
    predicted = [(c, Predictor(c).outcome(constants.setdefault(c.hardware, dict(shipped(c.hardware))))) for c in few]
    assert step_errors(predicted)["median"] < 0.07
