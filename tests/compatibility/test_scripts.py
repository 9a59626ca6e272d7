"""Scripts for one GPU run unmodified, with the numbers of plain PyTorch. `python -m tests.compatibility` runs all of
them in all settings, and writes docs/compatibility.md."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.compatibility.__main__ import line, recorded
from tests.compatibility.cases import ALL, FP32, Case
from tests.compatibility.run import SETTINGS, difference, plain, run

BY_NAME = {case.name: case for case in ALL}
# What differs most, in half a minute; the others take minutes.
QUICK = {("nanogpt", "2"), ("hf_trainer", "2")}
RUNS = [(case.name, setting) for case in ALL for setting in SETTINGS]


def _parameter(name: str, setting: str) -> object:
    marks = () if (name, setting) in QUICK else pytest.mark.slow
    return pytest.param(BY_NAME[name], setting, id=f"{name} on {setting}", marks=marks)


def assert_same(case: Case, found: str, expected: str) -> None:
    assert difference(found, expected) <= case.bound, f"{found}\n--- plain PyTorch:\n{expected}"


@pytest.mark.parametrize(("case", "setting"), [_parameter(*r) for r in RUNS])
def test_a_script_prints_what_it_prints_under_plain_pytorch(case: Case, setting: str, tmp_path: Path) -> None:
    if case.missing:
        pytest.skip(f"{case.name} needs {', '.join(case.missing)}")
    done = run(case, setting, tmp_path)
    assert done.returncode == 0, done.stderr
    assert_same(case, done.stdout, plain(case))


@pytest.mark.slow
def test_training_goes_on_exactly_on_another_number_of_devices(tmp_path: Path) -> None:
    case = BY_NAME["checkpoints"]
    begun = run(case, "2", tmp_path)
    assert begun.returncode == 0, begun.stderr
    resumed = run(case, "4", tmp_path, "--resume", "checkpoint.pt")
    assert resumed.returncode == 0, resumed.stderr
    rest = plain(case).splitlines(keepends=True)[3:]
    assert len(rest) == 3
    assert_same(case, resumed.stdout, "".join(rest))


@pytest.mark.parametrize(
    ("found", "expected", "wanted"),
    [
        ("loss 1.25 of 3", "loss 1.25 of 3", 0.0),
        ("0.123457", "0.123456", 0.0),  # the last digit is rounded
        ("1.1000", "1.0000", 0.1),
        ("1 2", "1", float("inf")),
        ("4", "3", 1 / 3),
    ],
)
def test_outputs_are_compared_number_by_number(found: str, expected: str, wanted: float) -> None:
    assert difference(found, expected) == pytest.approx(wanted, abs=FP32 * 20)


def test_a_table_is_read_as_it_was_written() -> None:
    cells = {"1": "same", "2": "**1e-03**", "4": "not run", "chosen": "same"}
    titles = "| script | what it does | 1 | 2 | 4 | chosen |\n|---|---|---|---|---|---|\n"
    found = recorded(f"Text.\n\n{titles}{line(BY_NAME['vit'], cells)}\n")
    assert found["vit"] == cells
