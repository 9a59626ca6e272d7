"""The tutorial's scripts, run as a user runs them: as programs of their own."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Prepared:
    """What `prepare.py` made with a tiny model, and the first rows of its corpus."""

    folder: Path
    config: Path
    few_rows: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"


def run_script(name: str, state: Path, *args: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `tutorial/<name>` in the folder `state`, which also holds the caches and the user's state."""
    return subprocess.run(
        [sys.executable, str(ROOT / "tutorial" / name), *map(str, args)],
        env=environment(state, **environ),
        cwd=state,
        capture_output=True,
        text=True,
        timeout=240,
    )


def environment(state: Path, **environ: str) -> dict[str, str]:
    fixed = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(state / "state")}
    return {**os.environ, **fixed, "HF_DATASETS_CACHE": str(state / "datasets"), **environ}


def train(prepared: Prepared, folder: Path, *args: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """A short training run: two epochs of four steps; the last arguments win."""
    settings = ("--epochs", 2, "--batch-size", 8, "--block-size", 16, "--lr", 1e-2, "--log-interval", 2)
    paths = ("--model-name-or-path", prepared.model, "--dataset-name-or-path", prepared.few_rows)
    return run_script("train_qwen.py", folder, *paths, *settings, "--save-dir", folder / "out", *args, **environ)


def losses(result: subprocess.CompletedProcess[str]) -> list[tuple[int, float]]:
    """(step, loss) of every log line."""
    lines = re.findall(r"\[Step (\d+)/\d+\] \| Loss: (\S+)", result.stderr)
    return [(int(step), float(loss)) for step, loss in lines]
