"""The installed commands, as a person or a script runs them: speed, exit status, and what goes wrong."""

import os
import shutil
import signal
import sqlite3
import statistics
import subprocess
import sys
import sysconfig
import time
from contextlib import closing
from pathlib import Path

import pytest

from moai.cli import smi
from moai.platform import accelerators, state
from tests.cli.conftest import flavor

COMMANDS = Path(sysconfig.get_path("scripts"))
OF_A_TOKEN = [["moreh-smi"], ["moreh-switch-model", "--list"], ["moai", "status"]]
WITH_HELP = [["moreh-smi", "--help"], ["moreh-switch-model", "--help"], ["moai", "--help"]]
THAT_READ_STATE = [*OF_A_TOKEN, ["moai", "jobs"]]
UNWRITABLE = Path("/proc/self")
QUEUED = "/proc/{}/schedstat"  # Linux: the second number is how long it has waited for a core, in ns
TIMEOUT = 20.0
MOST_SECONDS = 0.4

pytestmark = pytest.mark.usefixtures("cluster")


def run(command, *arguments, stdin=None, **options):
    """One of the package's commands, to its end; `stdin` is a text, by default none."""
    return subprocess.run(
        [COMMANDS / command, *arguments], capture_output=True, text=True, input=stdin, timeout=TIMEOUT, **options
    )


def refused(command, *arguments, **options):
    """The one line on stderr of a command that must fail."""
    done = run(command, *arguments, **options)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith(f"{command}: ")
    return done.stderr


def seconds(command):
    """How long it takes, without the time in which it could have gone on, but other programs had the cores."""
    begun = time.perf_counter()
    with subprocess.Popen([COMMANDS / command[0], *command[1:]], stdout=subprocess.DEVNULL) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        taken = time.perf_counter() - begun
        queued = QUEUED.format(process.pid)
        waited = int(Path(queued).read_text().split()[1]) / 1e9 if Path(queued).exists() else 0.0
    assert process.returncode == 0
    return taken - waited


@pytest.mark.parametrize("command", [["moreh-smi"], ["moreh-smi", "-p"], ["moreh-switch-model", "--list"]])
def test_it_answers_within_four_tenths_of_a_second(command):
    seconds(command)  # the first run compiles modules and makes the database
    assert statistics.median(seconds(command) for _ in range(5)) < MOST_SECONDS


@pytest.mark.parametrize(
    "command", [["moreh-smi"], ["moreh-switch-model", "--list"], ["moai", "doctor"], ["moai", "jobs"]]
)
def test_it_does_not_import_torch(command):
    traced = [sys.executable, "-X", "importtime", COMMANDS / command[0], *command[1:]]
    done = subprocess.run(traced, capture_output=True, text=True, timeout=TIMEOUT)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "moai.platform.accelerators" in imported
    assert "torch" not in imported


@pytest.mark.parametrize("command", OF_A_TOKEN)
def test_a_token_that_does_not_exist_is_one_line(monkeypatch, command):
    monkeypatch.setenv("MOREH_SDA_TOKEN", "bm8tc3VjaC10b2tlbi1oZXJl")
    assert "bm8tc3VjaC10b2tlbi1oZXJl" in refused(*command)


@pytest.mark.parametrize("command", THAT_READ_STATE)
def test_a_damaged_database_is_one_line_and_stays_as_it_is(command):
    accelerators.add(flavor("Small.64GB"))
    file = state.database()
    damaged = b"This is no database. " * 1000
    file.write_bytes(damaged)
    assert str(file) in refused(*command)
    assert file.read_bytes() == damaged


@pytest.mark.skipif(not UNWRITABLE.exists(), reason="there is no folder that nobody can write, root neither")
@pytest.mark.parametrize("command", THAT_READ_STATE)
def test_a_state_folder_that_cannot_be_written_is_one_line(monkeypatch, command):
    monkeypatch.setenv("XDG_STATE_HOME", str(UNWRITABLE))
    assert "XDG_STATE_HOME" in refused(*command)


@pytest.mark.parametrize("command", THAT_READ_STATE)
def test_a_state_folder_where_a_file_stands_is_one_line(home, command):
    (home / "moai").touch()
    assert str(home / "moai") in refused(*command)


def test_a_locked_database_is_one_line(monkeypatch, capsys):
    accelerators.add(flavor("Small.64GB"))
    monkeypatch.setattr(state, "BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(state.database(), isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        assert smi.main([]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "locked" in err
    assert run("moreh-smi").stdout.count("MoAI Accelerator") == 2


@pytest.mark.parametrize("command", [["moreh-smi"], ["moreh-smi", "device", "--list"], ["moreh-switch-model"]])
@pytest.mark.parametrize("text", ["[[flavor]\n", '[[flavor]]\nname = "Small"\n', "[[flavor]]\nname = 3\n"])
def test_a_broken_flavors_file_is_one_line(monkeypatch, tmp_path, command, text):
    (tmp_path / "flavors.toml").write_text(text)
    monkeypatch.setenv("MOAI_CONFIG", str(tmp_path / "flavors.toml"))
    assert "flavors.toml" in refused(*command)


@pytest.mark.parametrize("arguments", [["device", "--rm", "7"], ["device", "--switch", "7"], ["-i", "7"], ["-i", "x"]])
def test_an_unknown_accelerator_is_one_line(arguments):
    refused("moreh-smi", *arguments)


def test_a_sixth_accelerator_is_one_line():
    for _ in range(4):
        assert run("moreh-smi", "device", "--add", "1").returncode == 0
    assert "5" in refused("moreh-smi", "device", "--add", "1")


def test_selections_can_be_piped_in():
    done = run("moreh-switch-model", stdin="4\nq\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert 'The MoAI Accelerator model is successfully switched to  "xLarge.512GB".\n' in done.stdout


def test_selections_can_be_piped_in_with_pauses():
    with subprocess.Popen([COMMANDS / "moreh-switch-model"], stdin=-1, stdout=-1, text=True) as process:
        assert process.stdin and process.stdout
        for answer in ("4", "q"):
            process.stdin.write(f"{answer}\n")
            process.stdin.flush()
            time.sleep(0.2)
        assert process.wait(TIMEOUT) == 0
        assert "xLarge.512GB" in process.stdout.read()


def test_a_wrong_selection_is_one_line_and_a_failure():
    for wrong in ("99", "x", "\udcff"):
        done = subprocess.run(
            [COMMANDS / "moreh-switch-model"],
            input=os.fsencode(f"{wrong}\nq\n"),
            capture_output=True,
            timeout=TIMEOUT,
        )
        assert done.returncode == 1
        assert done.stderr.count(b"\n") == 1


@pytest.mark.parametrize("command", [*THAT_READ_STATE, *WITH_HELP, ["moreh-smi", "--watch", "0.01"]])
def test_a_closed_pipe_is_one_line(command):
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as nobody_reads:
        arguments = [COMMANDS / command[0], *command[1:]]
        done = subprocess.run(arguments, stdout=nobody_reads, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert done.returncode == 141
    assert done.stderr == f"{command[0]}: The reader of the output went away before all of it was written.\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_a_full_disk_is_one_line():
    with open("/dev/full", "w") as full:
        done = subprocess.run([COMMANDS / "moreh-smi"], stdout=full, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1


def test_a_terminal_without_korean_shows_the_screen_all_the_same(monkeypatch):
    monkeypatch.setenv("MOAI_DEVICE_NAME", "가속기")
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = run("moreh-smi")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("arguments", [["--watch", "0.05"], ["-p", "--watch", "0.05"], ["--json", "--watch", "0.05"]])
def test_ctrl_c_ends_watching_with_success(arguments):
    with subprocess.Popen([COMMANDS / "moreh-smi", *arguments], stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout and process.stderr
        first = process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 0
        assert process.stderr.read() == ""
    assert first


def test_ctrl_c_at_the_prompt_changes_nothing():
    with subprocess.Popen([COMMANDS / "moreh-switch-model"], stdin=-1, stdout=-1, stderr=-1, text=True) as process:
        assert process.stdout and process.stderr
        while not process.stdout.readline().startswith("13. "):
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 130
        assert "Traceback" not in process.stderr.read()


def test_a_shell_can_complete_the_commands_of_moai(monkeypatch):
    monkeypatch.setenv("_MOAI_COMPLETE", "bash_complete")
    monkeypatch.setenv("COMP_WORDS", "moai do")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run("moai").stdout == "plain,doctor\n"


def test_all_commands_are_installed():
    assert all(shutil.which(name, path=str(COMMANDS)) for name in ("moai", "moreh-smi", "moreh-switch-model"))
