"""Runs scripts, and holds what they print against what they print under plain PyTorch.

A *setting* is "plain" (PyTorch on the CPU), a number of devices, or "chosen": four devices under the plan that the
planner chose, in fp32.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.compatibility.cases import Case

PLAIN, CHOSEN = "plain", "chosen"
SETTINGS = ("1", "2", "4", CHOSEN)
_CHILD = Path(__file__).with_name("child.py")
_TIMEOUT = 280
_NUMBER = re.compile(r"(?<![\w.])-?\d+\.?\d*(?:[eE][-+]?\d+)?")
_NOT_RESULTS = re.compile(r"device='\w+(:0)?'|.*_runtime.*")


def run(case: Case, setting: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script under a setting, in a folder of its own."""
    options = [f"--{setting}"] if setting in (PLAIN, CHOSEN) else []
    options += ["--host-random"] if case.draws else []
    command = [sys.executable, str(_CHILD), *options, str(case.path), *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment(setting), capture_output=True, text=True, timeout=_TIMEOUT
    )


def environment(setting: str) -> dict[str, str]:
    """That of a script under a setting."""
    env = {k: v for k, v in os.environ.items() if k not in ("MOAI_DEVICES", "MOAI_FLAVOR", "MOAI_PLAN")}
    env |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if setting == PLAIN:
        return env | {"MOAI_CUDA": "0"}
    return env | {"MOAI_CUDA": "1", "MOAI_DEVICES": "4" if setting == CHOSEN else setting}


@functools.cache
def plain(case: Case) -> str:
    """What the script prints under plain PyTorch. Raises RuntimeError if it fails there."""
    with tempfile.TemporaryDirectory() as folder:
        done = run(case, PLAIN, Path(folder))
    if done.returncode:
        raise RuntimeError(f"{case.name} fails under plain PyTorch:\n{done.stderr[-3000:]}")
    return done.stdout


def difference(found: str, expected: str) -> float:
    """The largest relative difference of the numbers in two outputs, beyond their last printed digit; infinite if one
    has more of them."""
    ours, theirs = _numbers(found), _numbers(expected)
    if len(ours) != len(theirs):
        return float("inf")
    return max((_relative(a, b) for a, b in zip(ours, theirs, strict=True)), default=0.0)


def _numbers(text: str) -> list[str]:
    return _NUMBER.findall(_NOT_RESULTS.sub("", text))


def _relative(found: str, expected: str) -> float:
    a, b = float(found), float(expected)
    mantissa, _, exponent = expected.lower().partition("e")
    digit = 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])) if "." in mantissa else 0.0
    beyond = abs(a - b) - 1.01 * digit
    return 0.0 if beyond <= 0 else beyond / max(abs(b), 1e-12)
