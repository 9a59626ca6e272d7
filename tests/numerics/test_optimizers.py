"""Whatever optimizes, and however a script accumulates: the losses are those of plain PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache

import pytest

from benchmarks.child import ROOT

CASES = ("adamw", "fused.clip", "sgd.accumulate", "single.twice", "foreach.accumulate.clip", "adafactor")
# Three devices divide nothing here: neither the batch nor any dim of a parameter.
PLANS = ("dp=3,distribute_param=true", pytest.param("tp=2,micro=3", marks=pytest.mark.slow))


def run(device: str, **environment: str) -> dict[str, list[float]]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-m", "tests.numerics.optimizers", device, *CASES]
    done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found


@cache
def plain() -> dict[str, list[float]]:
    return run("cpu", MOAI_CUDA="0")


def devices(plan: str) -> int:
    return int(plan.partition(",")[0].partition("=")[2])


@pytest.mark.parametrize("plan", PLANS)
def test_losses_are_those_of_plain_pytorch(plan: str) -> None:
    got, expected = run("cuda", MOAI_CUDA="1", MOAI_PLAN=plan, MOAI_DEVICES=str(devices(plan))), plain()
    worst = {c: max(abs(a - b) / abs(b) for a, b in zip(got[c], expected[c], strict=True)) for c in CASES}
    assert all(difference <= 1e-10 for difference in worst.values()), worst
