"""A script may be started by the launchers that scripts for GPUs are started with, of one process."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.compatibility.cases import ALL
from tests.compatibility.run import difference, environment, plain

BY_NAME = {case.name: case for case in ALL}
# `accelerate launch` and `torchrun`, which are scripts beside the interpreter and call these.
LAUNCHERS = {
    "accelerate": ("accelerate.commands.accelerate_cli", "launch"),
    "torchrun": ("torch.distributed.run", "--nproc_per_node=1"),
}


def launch(name: str, script: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    module, *options = LAUNCHERS[name]
    env = environment("2") | {"HF_HOME": str(folder)}  # where `accelerate config` would have left its answers
    command = [sys.executable, "-m", module, *options, str(script)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=200)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["accelerate_loop", "hf_trainer"])
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_launched_script_prints_what_it_prints_under_plain_pytorch(launcher: str, name: str, tmp_path: Path) -> None:
    case = BY_NAME[name]
    if case.missing:
        pytest.skip(f"{case.name} needs {', '.join(case.missing)}")
    done = launch(launcher, case.path, tmp_path)
    assert done.returncode == 0, done.stderr
    assert difference(done.stdout, plain(case)) <= case.bound, f"{done.stdout}\n--- plain PyTorch:\n{plain(case)}"


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_several_processes_are_refused_with_what_to_do(launcher: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("import torch; torch.distributed.init_process_group('nccl')\n")
    module, *_ = LAUNCHERS[launcher]
    options = ("launch", "--multi_gpu", "--num_processes=2") if launcher == "accelerate" else ("--nproc_per_node=2",)
    command = [sys.executable, "-m", module, *options, "script.py"]
    env = {**os.environ, **environment("2"), "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    assert "start the script once" in done.stderr.lower(), done.stderr
