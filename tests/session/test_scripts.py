"""What a script sees of its accelerator: its errors, its memory, its end. Every test runs a real script."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest


def start(script: str, **environment: str) -> subprocess.Popen[str]:
    env = {**os.environ, "MOAI_DEVICES": "2", "OMP_NUM_THREADS": "1", **environment}
    env = {k: v for k, v in env.items() if v}
    command = [sys.executable, "-c", "import torch\n" + script]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    process = start(script, **environment)
    out, err = process.communicate(timeout=120)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def assert_fails_clearly(done: subprocess.CompletedProcess[str], *texts: str) -> None:
    assert done.returncode == 1, done.stderr
    for text in texts:
        assert text in done.stderr
    assert f"{os.sep}moai{os.sep}" not in done.stderr, "the error shows the platform's own files"


LARGE_SUM = "x = torch.ones(2048, 512).cuda(); y = (x @ x.t()).sum()\n"  # 2**31


def test_an_unknown_flavor_is_refused_at_first_use_with_the_names_there_are() -> None:
    done = run("torch.ones(2).cuda()", MOAI_DEVICES="", MOAI_FLAVOR="Gigantic")
    assert_fails_clearly(done, "Gigantic", "Small.", "Medium.")


def test_a_tensor_left_on_the_cpu_is_named_with_the_operator() -> None:
    done = run("x = torch.ones(4).cuda()\nprint(x * torch.ones(4))")
    assert_fails_clearly(done, "aten.mul.Tensor", "(4,) on the CPU", ".to('cuda')")


def test_a_step_that_does_not_fit_is_refused_with_the_bytes_before_anything_moves() -> None:
    done = run("x = torch.zeros(40_000, 40_000, device='cuda')\nprint(((x + 1) @ x).sum().item())", MOAI_DEVICES="1")
    assert_fails_clearly(done, "Error Code 4: OUT_OF_MEMORY", ">> Memory requested :", ">> Memory available :")


def test_a_failed_step_says_why_and_later_uses_of_its_values_say_it_again() -> None:
    script = """
x = torch.zeros(40_000, 40_000, device='cuda'); y = ((x + 1) @ x).sum()
try:
    y.item()
except RuntimeError as first:
    print('first', 'OUT_OF_MEMORY' in str(first))
try:
    y.item()
except RuntimeError as second:
    print('second', 'The step that computed this value failed' in str(second))
print(torch.ones(3).cuda().sum().item())
"""
    assert run(script, MOAI_DEVICES="1").stdout.split() == ["first", "True", "second", "True", "3.0"]


def test_a_forked_process_is_told_that_it_cannot_use_the_accelerator() -> None:
    script = (
        LARGE_SUM
        + """
print(y.item()); import os, sys
sys.stdout.flush()
if os.fork() == 0:
    try:
        print((x @ x.t()).sum().item())
    except RuntimeError as error:
        print('refused', 'spawn' in str(error)); sys.stdout.flush()
    os._exit(0)
os.wait(); print((x @ x.t()).sum().item())
"""
    )
    done = run(script)
    assert done.stdout.split() == ["2147483648.0", "refused", "True", "2147483648.0"], done.stderr


def test_data_loader_workers_do_not_disturb_the_accelerator() -> None:
    script = """
from torch.utils.data import DataLoader
total = torch.zeros((), device='cuda')
for batch in DataLoader(torch.arange(64.), batch_size=8, num_workers=2, pin_memory=True):
    total += batch.cuda().sum()
print(total.item())
"""
    done = run(script)
    assert done.stdout.split() == ["2016.0"], done.stderr


def workers_of(pid: int) -> list[psutil.Process]:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        found = [
            p for p in psutil.Process(pid).children(recursive=True) if "moai.runtime.worker" in " ".join(p.cmdline())
        ]
        if len(found) == 2:
            return found
        time.sleep(0.1)
    raise AssertionError("the script did not start its workers")


@pytest.mark.parametrize(
    "ending", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=["kill -9", "terminate", "Ctrl-C"]
)
def test_no_worker_outlives_its_script_by_five_seconds(ending: signal.Signals) -> None:
    process = start(LARGE_SUM + "print(y.item(), flush=True)\nimport time; time.sleep(100)")
    assert process.stdout is not None
    assert process.stdout.readline()
    workers = workers_of(process.pid)
    process.send_signal(ending)
    process.communicate(timeout=20)
    _, alive = psutil.wait_procs(workers, timeout=5)
    assert not alive


def test_a_killed_worker_ends_the_script_with_its_device_and_signal() -> None:
    loop = "print(y.item(), flush=True)\nwhile True:\n    z = (x @ x.t()).sum().item()\n"
    process = start(LARGE_SUM + loop)
    assert process.stdout is not None
    process.stdout.readline()
    workers_of(process.pid)[1].kill()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert re.search(r"RuntimeError: device [01] \(cpu:[01], pid \d+\) was lost in step \d+", err), err
    assert "SIGKILL" in err


def test_the_script_holds_the_model_once_and_gives_it_up_to_the_workers() -> None:
    """Peak: the model once and 500 MB, which a second copy of this model (of 610 MB) would exceed."""
    script = """
model = torch.nn.Sequential(*(torch.nn.Linear(4000, 4000, bias=False) for _ in range(10))).cuda()
optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
for _ in range(2):
    model(torch.randn(2, 4000).cuda()).sum().backward()
    optimizer.step(); optimizer.zero_grad()
print(model[0].weight.sum().item())
status = dict(line.split(':') for line in open('/proc/self/status'))
print(*(int(status[name].split()[0]) / 1024 for name in ('VmHWM', 'VmRSS')))
"""
    done = run(script, MOAI_DEVICES="1")
    peak, now = map(float, done.stdout.split()[1:])
    size = 10 * 4000 * 4000 * 4 / 2**20
    assert peak <= size + 500, done.stderr
    assert now <= 500


def test_a_script_that_never_touches_the_device_starts_nothing() -> None:
    done = run("print(torch.cuda.is_available(), torch.cuda.device_count())")
    assert (done.stdout.split(), done.stderr) == (["True", "1"], "")


def test_the_log_tells_of_the_resources_in_order() -> None:
    done = run(LARGE_SUM + "y.item()", MOREH_LOG_PREFIX="short")
    lines = [line.removeprefix("[info] ") for line in done.stderr.splitlines() if line.startswith("[info]")]
    assert lines[:2] == [
        "Requesting resources for MoAI Accelerator from the server...",
        "Initializing the worker daemon for MoAI Accelerator",
    ]
    lines = [line for line in lines if not line.startswith("Starting the devices")]
    assert re.fullmatch(r"\[1/1\] Connecting to resources on the server \(127\.0\.0\.1:\d+\)\.\.\.", lines[2])
    assert lines[3:5] == ["Establishing links to the resources...", "MoAI Accelerator is ready to use."]
    assert lines[5].startswith("Moreh Version: ")
    assert re.fullmatch(r"Moreh Job ID: \d+", lines[6])


def test_the_script_is_found_in_the_cause_of_a_new_graph(tmp_path: Path) -> None:
    script = tmp_path / "steps.py"
    script.write_text(
        "import torch\n"
        "weight = torch.ones(600, 600).cuda()\n"
        "for step in range(3):\n"
        "    x = weight @ weight\n"
        "    if step == 2:\n"
        "        x = x.cos()\n"
        "    print((x @ weight).sum().item())\n"
    )
    env = {**os.environ, "MOAI_DEVICES": "1"}
    done = subprocess.run([sys.executable, str(script)], env=env, capture_output=True, text=True, timeout=120)
    causes = [line for line in done.stderr.splitlines() if "New graph" in line]
    assert len(causes) == 1
    assert "aten.cos.default instead of aten.mm.default" in causes[0]
    assert causes[0].endswith("at steps.py:6")
