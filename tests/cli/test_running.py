"""The commands while another process uses an accelerator."""

import io
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest

from moai.cli import smi, switch_model
from moai.platform import accelerators, flavors

TIMEOUT = 20.0
PROGRAM = """
import sys, time
from types import SimpleNamespace
from moai.platform import accelerators, admission, telemetry
lease = admission.acquire(accelerators.choose(), "No PP, No TP, dp : 2")
report = SimpleNamespace(memory=100 * 2**20, peak=150 * 2**20, busy=0.5)
publisher = telemetry.Publisher(lease.job_id, lease.devices, lambda: [report] * len(lease.devices))
while telemetry.read(lease.job_id) is None:
    time.sleep(0.01)
print("runs", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def start(home, tmp_path):
    """Starts a process that uses an accelerator until its stdin ends; the environment is this one's and `variables`."""
    script = tmp_path / "train.py"
    script.write_text(PROGRAM)
    with ExitStack() as stack:

        def run(**variables):
            environ = {**os.environ, **variables}
            process = subprocess.Popen([sys.executable, script], stdin=-1, stdout=-1, text=True, env=environ)
            stack.enter_context(process)
            assert process.stdout
            assert process.stdout.readline() == "runs\n"
            return process

        yield run  # leaving the stack closes their stdin and awaits them


@pytest.fixture
def program(start):
    """A process on the default accelerator: two CPU workers of this machine."""
    accelerators.set_flavor(next(f for f in flavors.available() if f.n_devices == 2))
    return start()


def shown(capsys, *arguments):
    assert smi.main(list(arguments)) == 0
    return capsys.readouterr().out


def refused(capsys, command, *arguments):
    assert command.main(list(arguments)) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    return err


def test_its_command_line_pid_memory_and_plan_are_shown(program, capsys):
    out = shown(capsys)
    assert "  200 MiB  " in out.splitlines()[6]
    assert "|   50 %        |" in out
    assert f"|  {program.pid}  |  {sys.executable} {program.args[1]}  |  200 MiB       |" in out
    assert out.endswith("No PP, No TP, dp : 2\n")


def test_its_devices_are_shown(program, capsys):
    lines = shown(capsys, "-p").splitlines()[4:-1]
    assert [line.split("|")[5].strip() for line in lines] == ["50 %", "50 %"]


@pytest.mark.parametrize("arguments", [["device", "--rm", "0"], ["device", "--switch", "0"]])
def test_its_accelerator_can_be_neither_removed_nor_switched_to(program, capsys, arguments):
    accelerators.add(flavors.available()[0])
    assert str(program.pid) in refused(capsys, smi, *arguments)
    assert len(accelerators.accelerators()) == 2


def test_the_model_of_its_accelerator_cannot_be_switched(program, capsys):
    before = accelerators.accelerators()[0].flavor
    line = refused(capsys, switch_model, "1")
    assert line.endswith(": The model cannot be switched while the MoAI Accelerator is in use.\n")
    assert accelerators.accelerators()[0].flavor == before


def test_rm_all_keeps_its_accelerator(program, capsys):
    first = flavors.available()[0]
    for _ in range(2):
        accelerators.add(first)
    accelerators.switch(1)
    assert smi.main(["device", "--rm", "--all"]) == 1
    assert [a.id for a in accelerators.accelerators()] == [0, 1]
    assert capsys.readouterr().err.count("\n") == 1


def test_reset_ends_it(program, capsys):
    assert shown(capsys, "--reset") == "Device release success.\n"
    assert program.wait(TIMEOUT) == -signal.SIGTERM
    assert "Processes:" not in shown(capsys)


def test_no_row_of_a_killed_process_survives_two_seconds(program, capsys):
    os.kill(program.pid, signal.SIGKILL)
    deadline = time.monotonic() + 2
    while "Processes:" in shown(capsys):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_an_accelerator_of_its_own_is_shown_but_cannot_be_selected(start, capsys, monkeypatch):
    own = start(MOAI_DEVICES="1")
    assert f"|  {own.pid}  |" in shown(capsys)
    monkeypatch.setattr("sys.stdin", io.StringIO("q\n"))
    assert shown(capsys, "device", "--switch").endswith("\n\nSelection (0-0, q, Q): q\n")


def test_two_programs_on_two_accelerators_are_shown_side_by_side(start, capsys):
    smallest = flavors.available()[0]
    accelerators.set_flavor(smallest)
    accelerators.add(smallest)
    first, second = start(), start(MOREH_VISIBLE_DEVICE="1")
    rows = shown(capsys).partition("Processes:")[2].splitlines()[4:6]
    assert [[cell.strip() for cell in row.split("|")][1:4:2] for row in rows] == [
        ["0", str(first.pid)],
        ["1", str(second.pid)],
    ]
