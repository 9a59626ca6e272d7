"""Losses of 20 steps on an accelerator of 1 to 4 devices are those of plain PyTorch on one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("train.py")

FP64 = ("fp64.adamw", "fp64.fused.clip", "fp64.sgd.accumulate", "fp64.single.twice", "fp64.foreach.accumulate.clip")
HUGGING_FACE = (
    "qwen2.adamw", "llama.adamw", "mistral.adamw", "gpt2.adamw", "opt.adamw",
    "qwen2.adamw.eager", "llama.adamw.eager", "mistral.adamw.eager", "gpt2.adamw.eager", "opt.adamw.eager",
    "qwen2.foreach.mask", "qwen2.fused.clip", "llama.single", "gpt2.sgd", "llama.adafactor",
)  # fmt: skip
DOUBLE = tuple(f"{model}.adamw.double" for model in ("qwen2", "llama", "mistral", "gpt2", "opt"))


def run(device: str, cases: tuple[str, ...], **environment: str) -> dict[str, list[float]]:
    env = {**os.environ, "MOAI_CUDA": "0", **environment}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), device, *cases], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@cache
def plain(cases: tuple[str, ...]) -> dict[str, list[float]]:
    return run("cpu", cases)


def on_devices(n: int, cases: tuple[str, ...]) -> dict[str, list[float]]:
    return run("cuda", cases, MOAI_CUDA="1", MOAI_DEVICES=str(n))


def furthest(got: dict[str, list[float]], expected: dict[str, list[float]]) -> dict[str, float]:
    """The largest relative difference of each case."""
    assert got.keys() == expected.keys()
    return {case: max(abs(a - b) / abs(b) for a, b in zip(got[case], expected[case], strict=True)) for case in expected}


def assert_close(n: int, cases: tuple[str, ...], tolerance: float) -> None:
    worst = furthest(on_devices(n, cases), plain(cases))
    assert all(difference <= tolerance for difference in worst.values()), worst


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_model_that_stays_in_fp64_agrees_to_1e_10(n: int) -> None:
    assert_close(n, FP64, 1e-10)


@pytest.mark.parametrize(
    "cases", [HUGGING_FACE[:5], HUGGING_FACE[5:10], HUGGING_FACE[10:]], ids=["sdpa", "eager", "optimizers"]
)
def test_hugging_face_models_in_fp32_agree_to_1e_5_on_two_devices(cases: tuple[str, ...]) -> None:
    assert_close(2, cases, 1e-5)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_hugging_face_models_in_fp64_agree_to_1e_6(n: int) -> None:
    assert_close(n, DOUBLE[:: 1 if n == 2 else 2], 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 3, 4])
def test_hugging_face_models_in_fp32_agree_to_1e_5(n: int) -> None:
    assert_close(n, HUGGING_FACE, 1e-5)


def test_dropout_draws_the_same_masks_on_any_number_of_devices() -> None:
    one = on_devices(1, ("dropout.adamw",))
    for n in (2, 3):
        worst = furthest(on_devices(n, ("dropout.adamw",)), one)
        assert worst["dropout.adamw"] <= 1e-10, worst
    without = plain(("fp64.adamw",))["fp64.adamw"]
    assert one["dropout.adamw"] != without
