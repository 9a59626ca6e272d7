"""Runs cases in processes of their own, and compares what came of them with plain PyTorch.

In: points (plans) and models. Out: a `Row` for each pair of them. A process runs one plan and all its models, since
starting it takes longer than training one of them. Plain PyTorch on the CPU is the reference; where a model draws
random numbers, which are the accelerator's own, it is the accelerator with one device.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from benchmarks.child import ROOT
from benchmarks.numerics.models import MODELS
from benchmarks.numerics.plans import Point
from benchmarks.numerics.script import LEARNING_RATE, Case, Training

Outcome = Literal["same", "differs", "refused", "failed"]
Results = dict[Case, Training | str]

_START_SECONDS, _CASE_SECONDS = 60, 40
_OF_LOWERING = ("MOAI_PROGRAM_CACHE", "MOAI_VALIDATE")  # kept: they change no number
# Of losses and norms, and of parameters, by what the case computes in; in bf16 the unit is bf16's own error.
TOLERANCE = {"fp64": 1e-10, "fp64 with fp32": 1e-6, "fp32": 1e-5, "bf16": 3.0}
_FEWEST = 3  # at least so many steps make a distance in bf16


@dataclass(frozen=True, slots=True)
class Row:
    """One model under one plan. `differences`: of losses, norms and parameters, as `compare` gives them; empty where
    there are no numbers, for the `reason`."""

    point: Point
    model: str
    outcome: Outcome
    differences: tuple[float, ...] = ()
    reason: str = ""


def applies(model: str, point: Point) -> bool:
    """Whether a model can be in the point's precision at all."""
    return point.precision != "fp64" or MODELS[model].takes_fp64


def case_of(model: str, point: Point, steps: int) -> Case:
    """The case that a point makes of a model."""
    return Case(model, point.precision, point.batch, steps, point.layers)


def computes_in(case: Case) -> str:
    """The key of TOLERANCE."""
    return "fp64 with fp32" if case.precision == "fp64" and not MODELS[case.model].stays_fp64 else case.precision


class Runner:
    """Runs cases in `folder`, which keeps what came of them and the state of their accelerators."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._references: Results = {}

    def run(self, point: Point, cases: Sequence[Case]) -> Results:
        """What came of the cases under a plan: a Training, or an error's text."""
        return self._on_accelerator(str(point), point.n_devices, cases)

    def reference(self, case: Case) -> Training:
        """The numbers to compare with. RuntimeError where plain PyTorch has none, which is a mistake in the models."""
        found = self._references[case]
        if isinstance(found, str):
            raise RuntimeError(f"the reference of {case} failed: {found}")
        return found

    def prepare(self, cases: Sequence[Case]) -> None:
        """Work out the references of `cases`, and of their fp32 twins where they compute in bf16."""
        twins = [replace(c, precision="fp32") for c in cases if c.precision == "bf16"]
        wanted = sorted({*cases, *twins} - self._references.keys(), key=str)
        plain = [c for c in wanted if not MODELS[c.model].draws]
        self._references |= self._processes("reference", "cpu", plain, {"MOAI_CUDA": "0"})
        for precision in sorted({c.precision for c in wanted}):
            drawing = [c for c in wanted if MODELS[c.model].draws and c.precision == precision]
            self._references |= self._on_accelerator(f"dp=1,precision={precision}", 1, drawing)

    def _on_accelerator(self, plan: str, devices: int, cases: Sequence[Case]) -> Results:
        return self._processes(plan, "cuda", cases, {"MOAI_CUDA": "1", "MOAI_DEVICES": str(devices), "MOAI_PLAN": plan})

    def _processes(self, name: str, device: str, cases: Sequence[Case], settings: Mapping[str, str]) -> Results:
        """Run the script until each case has come to something: it ends at the first one that fails."""
        folder = self._folder / name
        folder.mkdir(parents=True, exist_ok=True)
        results: Results = {}
        while len(results) < len(cases):
            remaining = [c for c in cases if c not in results]
            last_words = _script(device, folder, remaining, self._environment(settings))
            found = {c: r for c in remaining if (r := _result(folder, c)) is not None}
            results |= found or {remaining[0]: last_words}
        return results

    def _environment(self, settings: Mapping[str, str]) -> dict[str, str]:
        """Accelerators of its own: no queue of other programs, and no plan that the user has chosen."""
        chosen = {
            name: value
            for name, value in os.environ.items()
            if name in _OF_LOWERING or not name.startswith(("MOAI_", "MOREH_"))
        }
        state = {"XDG_STATE_HOME": str(self._folder / "state"), "XDG_CONFIG_HOME": str(self._folder / "config")}
        return {**chosen, **state, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **settings}


def _script(device: str, folder: Path, cases: Sequence[Case], environment: Mapping[str, str]) -> str:
    """Run the script once; the end of what it wrote to stderr."""
    command = [sys.executable, "-m", "benchmarks.numerics.script", device, str(folder), *map(str, cases)]
    limit = _START_SECONDS + _CASE_SECONDS * len(cases)
    try:
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    except subprocess.TimeoutExpired:
        return f"no end within {limit} s"
    return done.stderr[-2000:].strip() or f"ended with status {done.returncode}"


def _result(folder: Path, case: Case) -> Training | str | None:
    error = folder / f"{case}.error"
    if error.exists():
        return error.read_text()
    file = folder / f"{case}.pt"
    return Training(*torch.load(file)) if file.exists() else None


def compare(runner: Runner, point: Point, model: str, result: Training | str, steps: int) -> Row:
    """The row of what came of a model under a plan."""
    case = case_of(model, point, steps)
    if isinstance(result, str):
        refused = result.startswith("PlanError")
        return Row(point, model, "refused" if refused else "failed", reason=result.removeprefix("PlanError: "))
    expected = runner.reference(case)
    if case.precision == "bf16":
        exact = runner.reference(replace(case, precision="fp32"))
        if max(differences(result, exact)) <= TOLERANCE["fp32"]:
            return Row(point, model, "failed", reason="the numbers are those of fp32: nothing was computed in bf16.")
        found = distances(result, expected, exact)
    else:
        found = differences(result, expected)
    close = all(d <= TOLERANCE[computes_in(case)] for d in found)  # also False for NaN
    return Row(point, model, "same" if close else "differs", found)


def differences(got: Training, expected: Training) -> tuple[float, float, float]:
    """The largest relative difference of a loss, of a norm, and of an entry of a parameter.

    Entries are measured by the largest one of their tensor, which is not taken for less than what AdamW may have moved
    it by: a bias whose gradient is zero in exact arithmetic is nothing but rounding.
    """
    moved = LEARNING_RATE * len(expected.losses)
    apart = 0.0
    for name, p in expected.parameters.items():
        scale = max(p.abs().max().item(), moved)
        apart = max(apart, _worst((got.parameters[name] - p).abs() / scale))
    return _relative(got.losses, expected.losses), _relative(got.norms, expected.norms), apart


def distances(got: Training, expected: Training, exact: Training) -> tuple[float, float, float]:
    """How far the plan's losses, norms and parameters are from those of plain bf16, over how far these are from fp32
    (root mean squares).

    Rounding differs wherever the order of a sum does, and training carries it on, so two runs in bf16 agree no better
    than each of them agrees with fp32: two independent errors of equal size are sqrt(2) of it apart. Ten losses are a
    small sample, hence a bound of twice that; a mean of means is thirty away.
    """
    assert len(expected.losses) >= _FEWEST, "a few steps are no sample"
    flat = [torch.cat([p.flatten() for p in t.parameters.values()]) for t in (got, expected, exact)]
    sets = ((got.losses, expected.losses, exact.losses), (got.norms, expected.norms, exact.norms), flat)
    ratios = [(torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b - c)).item() for a, b, c in sets]
    return ratios[0], ratios[1], ratios[2]


def _relative(got: torch.Tensor, expected: torch.Tensor) -> float:
    return _worst((got - expected).abs() / expected.abs())


def _worst(values: torch.Tensor) -> float:
    return values.max().item()
