"""When `import torch` turns the alias on, what that costs, and that it never breaks `import torch`."""

import os
import statistics
import subprocess
import sys

import pytest

ASK = "import torch; print(str(torch.device('cuda:0').type), torch.cuda.is_available(), hasattr(torch, 'moreh'))"
ON, OFF = "cuda True True", "cuda False True"


def run(code, tmp_path, **env):
    """Runs `code` in a process whose user has chosen no accelerator, but for `env`."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path), **env},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, OFF),
        ({"MOAI_FLAVOR": "anything"}, ON),
        ({"MOAI_DEVICES": "2"}, ON),
        ({"MOAI_CUDA": "1"}, ON),
        ({"MOREH_ENABLE_ADVANCED_PARALLELIZATION": "1"}, ON),
        ({"MOAI_PLAN": "dp=2"}, ON),
        ({"MOAI_PLAN": ""}, OFF),
        ({"MOAI_PLAN": "dp=2", "MOAI_CUDA": "0"}, OFF),
        ({"MOREH_ENABLE_ADVANCED_PARALLELIZATION": "0"}, OFF),
        ({"MOAI_CUDA": "0", "MOAI_DEVICES": "2"}, OFF),
    ],
)
def test_the_environment_decides(env, expected, tmp_path):
    out = run(ASK, tmp_path, **env)
    assert out.stdout.strip() == expected
    assert out.stderr == ""


def test_enable_advanced_parallelization_turns_it_on(tmp_path):
    code = f"import torch; torch.moreh.option.enable_advanced_parallelization(); {ASK}"
    assert run(code, tmp_path).stdout.strip() == ON


def test_moai_cuda_0_is_for_good_and_is_said(tmp_path):
    code = f"import torch; torch.moreh.option.enable_advanced_parallelization(); {ASK}"
    out = run(code, tmp_path, MOAI_CUDA="0")
    assert out.stdout.strip() == OFF
    assert out.stderr.strip() == "MOAI_CUDA=0 is set: this program runs without the accelerator."


def test_nothing_runs_where_torch_loads_no_backends(tmp_path):
    out = run(ASK, tmp_path, MOAI_CUDA="1", TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert out.stdout.strip() == "cuda False False"


def test_moreh_can_be_imported_before_torch(tmp_path):
    code = f"import moreh; moreh.option.enable_advanced_parallelization(); {ASK}"
    assert run(code, tmp_path).stdout.strip() == ON


def test_an_error_becomes_one_line_and_torch_is_imported(tmp_path):
    code = (
        "import sys, types\n"
        "broken = types.ModuleType('moai.device.alias')\n"
        "def turn_on(): raise OSError('disk\\nfull')\n"
        "broken.turn_on = turn_on\n"
        "sys.modules['moai.device.alias'] = broken\n"
        "import moai.device; moai.device.alias = broken\n"
        "import torch; print(torch.ones(2).sum().item())"
    )
    out = run(code, tmp_path, MOAI_CUDA="1")
    assert out.stdout.strip() == "2.0"
    assert out.stderr.strip() == "The MoAI Accelerator is not available: OSError: disk full"


def test_an_unknown_interpreter_is_refused_before_anything_is_changed(tmp_path):
    code = (
        "import torch\n"
        "from moai.device import inplace\n"
        "inplace._FLAGS_OFFSET += 8\n"
        "try: inplace.change(torch.device, {'x': 1})\n"
        "except RuntimeError as error: print('standard build of CPython' in str(error), hasattr(torch.device, 'x'))"
    )
    assert run(code, tmp_path).stdout.strip() == "True False"


def test_turning_it_on_costs_less_than_a_twenty_fifth_of_importing_torch(tmp_path):
    code = (
        "import time; start = time.process_time()\n"
        "import torch; torch_is_there = time.process_time()\n"
        "from moai._autoload import activate\n"
        "activate()\n"
        "print((time.process_time() - torch_is_there) / (torch_is_there - start))"
    )
    env = {"MOAI_CUDA": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    shares = [float(run(code, tmp_path, **env).stdout) for _ in range(3)]
    assert statistics.median(shares) < 1 / 25
