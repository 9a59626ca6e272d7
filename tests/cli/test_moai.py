"""`moai` (but for `moai run`): status, jobs, doctor, token, completion."""

import json
from functools import partial

import pytest

from moai.cli import app, doctor
from moai.platform import accelerators, jobs
from moai.platform.accelerators import RunningJob, Usage
from moai.platform.jobs import Job
from moai.platform.pool import GB, MB
from moai.version import __version__

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def moai_says(says, monkeypatch):
    """What `moai` with these arguments prints."""
    monkeypatch.setenv("COLUMNS", "200")
    return partial(says, app.main)


def job(id, **other):
    fields = {
        "accelerator": 0,
        "command": "python train.py [bold]",
        "pid": 4242,
        "flavor": "Large.256GB",
        "devices": (),
        "plan": "No PP, No TP, dp : 4",
        "started": 1_000.0,
        "ended": 4_723.0,
        "exit": "0",
        "tokens_per_s": 12_345.6,
        "peak_bytes": 3 * GB,
    }
    return Job(id=id, **{**fields, **other})


@pytest.fixture
def history(monkeypatch):
    """30 jobs; the last one still runs."""
    running = job(30, ended=None, exit=None, tokens_per_s=None, peak_bytes=None)
    past = (*(job(i) for i in range(1, 29)), job(29, exit="killed"), running)
    monkeypatch.setattr(jobs, "history", lambda environ: past)
    return past


def words(text, start):
    """The cells of the first line that starts with `start`."""
    return next(line for line in text.splitlines() if line.split()[:1] == [start]).split()


def test_status_shows_the_accelerators(moai_says):
    out = moai_says("status")
    assert f"MoAI Accelerator, version {__version__}" in out
    assert words(out, "*")[:3] == ["*", "0", accelerators.accelerators()[0].flavor.name]


def test_status_shows_what_runs(moai_says, monkeypatch):
    (idle,) = accelerators.accelerators()
    running = RunningJob(7, 4242, "python train.py", "No PP, No TP, dp : 4", 0.0, Usage(2048 * MB, 0.625, ()))
    busy = accelerators.Accelerator(0, idle.flavor, True, running)
    monkeypatch.setattr(accelerators, "accelerators", lambda environ: (busy,))
    out = moai_says("status")
    for part in ("2,048 /", "62%", "4242", "python train.py", "No PP, No TP, dp : 4"):
        assert part in out


def test_jobs_shows_the_last_twenty_newest_first(moai_says, history):
    shown = [line.split()[0] for line in moai_says("jobs").splitlines() if line[:4].strip().isdigit()]
    assert shown == [str(i) for i in range(30, 10, -1)]


def test_jobs_shows_as_many_as_are_asked_for(moai_says, history):
    assert len(json.loads(moai_says("jobs", "--json"))) == 20
    assert len(json.loads(moai_says("jobs", "--last", "3", "--json"))) == 3
    assert len(json.loads(moai_says("jobs", "--all", "--json"))) == 30


def test_a_job_shows_what_it_was_and_how_it_went(moai_says, history):
    lines = moai_says("jobs").splitlines()
    ended = next(line for line in lines if line.split()[:1] == ["28"])
    for part in ("python train.py [bold]", "Large.256GB", "No PP, No TP, dp : 4", "1:02:03", " 0 ", "12,346", "3,072"):
        assert part in ended
    assert "killed" in next(line for line in lines if line.split()[:1] == ["29"])


def test_a_running_job_shows_what_is_not_known_yet_as_dashes(moai_says, history):
    assert words(moai_says("jobs"), "30")[-4:] == ["-", "-", "-", "-"]


def test_json_of_jobs_has_every_field(moai_says, history):
    newest = json.loads(moai_says("jobs", "--json"))[0]
    assert (newest["id"], newest["ended"], newest["plan"]) == (30, None, "No PP, No TP, dp : 4")


def test_json_of_status_is_that_of_moreh_smi(moai_says):
    assert json.loads(moai_says("status", "--json"))["accelerators"][0]["id"] == 0


def test_doctor_succeeds_where_all_is_well(moai_says, monkeypatch):
    monkeypatch.setattr(doctor, "examine", lambda environ: (doctor.Check("Python", "3.12"),))
    assert moai_says("doctor").split() == ["ok", "Python", "3.12"]


def test_doctor_fails_and_says_what_to_do(capsys, monkeypatch):
    checks = (doctor.Check("Python", "3.12"), doctor.Check("torch", "not installed", "Install it."))
    monkeypatch.setattr(doctor, "examine", lambda environ: checks)
    assert app.main(["doctor"]) == 1
    assert "-> Install it." in capsys.readouterr().out
    assert app.main(["doctor", "--json"]) == 1
    assert [check["ok"] for check in json.loads(capsys.readouterr().out)] == [True, False]


def test_doctor_checks_this_environment(moai_says, monkeypatch):
    monkeypatch.setenv("MOAI_DEVICES", "1")
    monkeypatch.delenv("MOAI_CONFIG")  # the machine's own flavors
    names = [check["name"] for check in json.loads(moai_says("doctor", "--json"))]
    for name in ("Python", "torch", "import torch", "devices", "accelerator", "memory", "state folder", "database"):
        assert name in names


def test_without_a_history_there_is_no_table(moai_says):
    assert moai_says("jobs") == "No jobs yet.\n"
    assert moai_says("jobs", "--json") == "[]\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_names_every_command(moai_says, arguments):
    out = moai_says(*arguments)
    for name in ("run", "status", "jobs", "doctor", "token", "completion"):
        assert name in out


@pytest.mark.parametrize("command", ["run", "status", "jobs", "doctor", "token", "completion"])
def test_every_command_has_help(moai_says, command):
    assert f"moai {command} [OPTIONS]" in moai_says(command, "--help")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(moai_says, shell):
    assert f"_MOAI_COMPLETE={shell}_complete" in moai_says("completion", shell)


@pytest.mark.parametrize("arguments", [["statsu"], ["status", "--jsn"], ["jobs", "-n", "0"], ["jobs", "-n", "x"]])
def test_a_wrong_command_line_is_one_line(capsys, arguments):
    assert app.main(arguments) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.endswith("See moai --help.\n")


def test_a_new_token_has_an_accelerator_of_its_own(moai_says, monkeypatch):
    token = moai_says("token", "the night shift").strip()
    assert len(token) == 24
    monkeypatch.setenv("MOREH_SDA_TOKEN", token)
    assert [a.id for a in accelerators.accelerators()] == [0]
    described = json.loads(moai_says("token", "--json", "another"))
    assert described["description"] == "another"
    assert described["token"] != token
