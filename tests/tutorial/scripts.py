"""The tutorial's scripts, run as a user runs them: as programs of their own."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "qwen": "code",
    "mistral": "code",
    "llama2": "articles",
    "llama3": "articles",
    "gpt": "code",
    "opt": "code",
    "baichuan2": "questions",
}


@dataclass(frozen=True)
class Prepared:
    """What `prepare.py` made with tiny models, and the first rows of its data sets."""

    folder: Path
    configs: Path
    few_rows: Path

    def model(self, name: str = "qwen") -> Path:
        return self.folder / name

    def data(self, name: str = "qwen") -> Path:
        return self.few_rows / ROWS[name]


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
    """A short training run; the last arguments win."""
    save = ("--save-dir", folder / "out")
    return run_script("train_qwen.py", folder, *train_arguments(prepared, "qwen"), *save, *args, **environ)


def train_arguments(prepared: Prepared, name: str) -> list[str]:
    """Two epochs of four steps."""
    settings = ("--epochs", 2, "--batch-size", 8, "--block-size", 16, "--lr", 1e-2, "--log-interval", 2)
    paths = ("--model-name-or-path", prepared.model(name), "--dataset-name-or-path", prepared.data(name))
    return [str(argument) for argument in (*paths, *settings)]


def losses(log: str) -> list[tuple[int, float]]:
    """(step, loss) of every line about a step."""
    lines = re.findall(r"\[Step (\d+)/\d+\] \| Loss: (\S+)", log)
    return [(int(step), float(loss)) for step, loss in lines]


def eval_losses(log: str) -> list[float]:
    """The loss of every evaluation."""
    return [float(loss) for loss in re.findall(r"Eval Loss: (\S+)", log)]
