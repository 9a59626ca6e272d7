"""`moreh-smi`: what each form of it prints and does."""

import io
import json
from dataclasses import replace
from functools import partial

import pytest

from moai.cli import smi
from moai.platform import accelerators, flavors
from moai.platform.accelerators import DeviceUsage, RunningJob, Usage
from moai.platform.pool import MB
from moai.version import __version__
from tests.cli.conftest import flavor

pytestmark = pytest.mark.usefixtures("cluster")


@pytest.fixture
def smi_says(says):
    """What `moreh-smi` with these arguments prints."""
    return partial(says, smi.main)


@pytest.fixture
def smi_refuses(capsys):
    """The line on stderr with which `moreh-smi` refuses these arguments; it must print nothing else."""

    def run(*arguments):
        assert smi.main(list(arguments)) != 0
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return run


@pytest.fixture
def training(monkeypatch):
    """Accelerator 0 runs a program."""
    devices = (DeviceUsage("node07", 0, 100 * MB, 65_520 * MB, 0.5, None),)
    job = RunningJob(1001, 424242, "python train.py", "No PP, No TP, dp : 1", 1.0, Usage(100 * MB, 0.5, devices))
    real = accelerators.accelerators

    def with_job(environ):
        return tuple(replace(a, job=job) if a.id == 0 else a for a in real(environ))

    monkeypatch.setattr(accelerators, "accelerators", with_job)
    return job


def typed(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def ids():
    return [a.id for a in accelerators.accelerators()]


def default():
    return next(a.id for a in accelerators.accelerators() if a.is_default)


# What is shown


def test_without_arguments_it_shows_the_accelerators(smi_says):
    lines = smi_says().splitlines()
    assert lines[2].endswith(f"Current Version: {__version__}  Latest Version: {__version__}  |")
    assert lines[6].startswith("|  * 0     |   MoAI Accelerator  |")
    assert len(lines) == 8


def test_while_something_runs_it_shows_the_processes_and_the_plan(smi_says, training):
    out = smi_says()
    assert "|       0  |    1001  |  424242  |  python train.py  |  100 MiB       |" in out
    assert out.endswith("\n\nPlan of job 1001: No PP, No TP, dp : 1\n")


def test_i_shows_one_accelerator_in_both_tables(smi_says, training):
    smi.main(["device", "--add", "1"])
    smi_says("-v")
    both, busy, idle = smi_says(), smi_says("-i", "0"), smi_says("--idx", "1")
    assert both.count("MoAI Accelerator") == 2
    assert busy.count("MoAI Accelerator") == idle.count("MoAI Accelerator") == 1
    assert "Processes:" in busy
    assert "Processes:" not in idle


def test_versions_are_one_line(smi_says):
    assert smi_says("-v") == smi_says("--version") == f"{__version__}\n"
    assert smi_says("-s") == smi_says("--server-version") == f"{__version__}\n"


def test_the_operators_file_names_the_versions(smi_says, monkeypatch, tmp_path):
    file = tmp_path / "flavors.toml"
    file.write_text('display_name = "Ambre AI Accelerator"\n[versions]\nserver = "24.5.0"\nlatest = "24.6.0"\n')
    monkeypatch.setenv("MOAI_CONFIG", str(file))
    assert smi_says("-s") == "24.5.0\n"
    assert f"Current Version: {__version__}  Latest Version: 24.6.0  |" in smi_says()
    assert "|  Ambre AI Accelerator  |" in smi_says()


def test_versions_need_no_state(smi_says, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", "/dev/null")
    assert smi_says("-v") == f"{__version__}\n"


def test_t_shows_the_token(smi_says):
    for form in ("-t", "--token"):
        assert f"|  {accelerators.token()}  |" in smi_says(form)
    assert len(accelerators.token()) == 24


def test_p_shows_the_devices_of_the_default_accelerator(smi_says):
    accelerators.set_flavor(flavor("xLarge.512GB"))
    assert len(smi_says("-p").splitlines()) == 4 + 8 + 1


def test_p_shows_the_devices_of_a_named_accelerator(smi_says, monkeypatch):
    accelerators.set_flavor(flavor("xLarge.512GB"))
    accelerators.add(flavor("Medium.128GB"))
    assert len(smi_says("-p", "-i", "1").splitlines()) == 4 + 2 + 1
    monkeypatch.setenv("MOREH_VISIBLE_DEVICE", "1")
    assert len(smi_says("-p").splitlines()) == 4 + 2 + 1


def test_p_shows_what_a_running_program_does_to_its_devices(smi_says, training):
    assert "|  0    |  node07:0  |  -         |  -         |  50 %      |  -         |  0 %        |" in smi_says("-p")


def test_list_shows_what_can_be_added(smi_says):
    lines = smi_says("device", "--list").splitlines()
    assert lines == [f"{i}. {f.name}" for i, f in enumerate(flavors.available(), 1)]
    assert lines[0] == "1. Small.64GB"
    assert lines[-1] == "13. 48xLarge.24576GB"


def test_help_names_every_option(smi_says):
    text = smi_says("--help")
    groups = [text.index(part) for part in ("usage: moreh-smi", "basic options:", "device options:", "examples:")]
    assert groups == sorted(groups)
    for option in (
        "-h",
        "-r",
        "-s",
        "-v",
        "-t",
        "-i",
        "-p",
        "--json",
        "--watch",
        "--list",
        "--add",
        "--rm",
        "--switch",
    ):
        assert f" {option}" in text


# JSON


def test_json_of_the_default_screen(smi_says, training):
    status = json.loads(smi_says("--json"))
    (first,) = status["accelerators"]
    assert (first["id"], first["default"]) == (0, True)
    assert first["job"]["command"] == "python train.py"
    assert first["job"]["usage"]["devices"][0]["node"] == "node07"
    assert status["current_version"] == __version__


@pytest.mark.parametrize(
    "arguments", [["-p"], ["-t"], ["-s"], ["-v"], ["device", "--list"], ["-i", "0"], ["device", "--add", "2"]]
)
def test_every_view_has_a_json_form(smi_says, arguments):
    assert json.loads(smi_says(*arguments, "--json"))


def test_json_of_the_list_has_sizes(smi_says):
    first = json.loads(smi_says("device", "--list", "--json"))[0]
    assert first == {"number": 1, "flavor": "Small.64GB", "devices": 1, "total_memory_bytes": 65_520 * MB}


# Accelerators


def test_add_with_a_number_shows_all_accelerators_and_keeps_the_default(smi_says):
    out = smi_says("device", "--add", "10")
    assert out.splitlines()[-3].startswith("|    1     |   MoAI Accelerator  |  8xLarge.4096GB  |")
    assert out.splitlines()[-1] == "Create device success."
    assert default() == 0


def test_add_takes_a_name(smi_says):
    smi_says("device", "--add", "xlarge")
    assert accelerators.accelerators()[1].flavor.name == "xLarge.512GB"


def test_add_asks_until_q(smi_says, monkeypatch):
    typed(monkeypatch, "1\n13\nq\n")
    out = smi_says("device", "--add")
    menu = "".join(f"{i}. {f.name}\n" for i, f in enumerate(flavors.available(), 1))
    assert out.startswith(f"{menu}\nSelection (1-13, q, Q): 1\n+-")
    assert out.count(f"Create device success.\n\n{menu}\nSelection (1-13, q, Q): ") == 2
    assert out.endswith("Selection (1-13, q, Q): q\n")
    assert ids() == [0, 1, 2]


def test_rm_shows_what_is_left(smi_says):
    accelerators.add(flavor("Small.64GB"))
    out = smi_says("device", "--rm", "1")
    assert out.count("MoAI Accelerator") == 1
    assert out.splitlines()[-1] == "Remove device success."
    assert ids() == [0]


def test_ids_are_never_given_again(smi_says):
    smi_says("device", "--add", "1")
    smi_says("device", "--rm", "1")
    smi_says("device", "--add", "1")
    assert ids() == [0, 2]


def test_switch_moves_the_star(smi_says):
    accelerators.add(flavor("Small.64GB"))
    out = smi_says("device", "--switch", "1")
    assert [line[3:6] for line in out.splitlines()[3:5]] == ["  0", "* 1"]
    assert out.splitlines()[-1] == "Switch Current Device success."


def test_switch_asks_with_the_ids_that_there_are(smi_says, monkeypatch):
    accelerators.add(flavor("Small.64GB"))
    typed(monkeypatch, "1\n0\n1\nQ\n")
    out = smi_says("device", "--switch")
    assert out.startswith("+-")
    assert out.count("Switch Current Device success.\n\nSelection (0-1, q, Q): ") == 3
    assert default() == 1


def test_rm_asks_and_forgets_what_is_removed(monkeypatch, capsys):
    for _ in range(3):
        accelerators.add(flavor("Small.64GB"))
    typed(monkeypatch, "3\n3\n2\nq\n")
    assert smi.main(["device", "--rm"]) == 1
    out, err = capsys.readouterr()
    assert [line[:22] for line in out.splitlines() if "Selection" in line] == [
        "Selection (0-3, q, Q):",
        "Selection (0-2, q, Q):",
        "Selection (0-2, q, Q):",
        "Selection (0-1, q, Q):",
    ]
    assert err.count("\n") == 1
    assert ids() == [0, 1]


@pytest.mark.parametrize("form", [["--rm", "1"], ["device", "rm", "1"], ["device", "--rm", "1"]])
def test_forms_that_pages_of_the_original_use(smi_says, form):
    smi_says("device", "add", "3")
    smi_says(*form)
    assert ids() == [0]


def test_rm_all_leaves_the_default(smi_says):
    for _ in range(3):
        accelerators.add(flavor("Small.64GB"))
    accelerators.switch(2)
    assert smi_says("device", "rm", "--all").count("MoAI Accelerator") == 1
    assert ids() == [2]


# Reset


def test_reset_says_what_it_released(smi_says, monkeypatch):
    monkeypatch.setattr(accelerators, "reset", lambda environ: True)
    assert smi_says("-r") == smi_says("--reset") == "Device release success.\n"


def test_reset_of_an_idle_accelerator_fails(capsys):
    assert smi.main(["-r"]) == 1
    assert capsys.readouterr().out == "Device release failed. (Not running job.)\n"


def test_reset_takes_the_accelerator_that_is_named(smi_says, monkeypatch):
    accelerators.add(flavor("Small.64GB"))
    asked = []
    monkeypatch.setattr(accelerators, "reset", lambda environ: asked.append(environ["MOREH_VISIBLE_DEVICE"]) or True)
    smi_says("-r", "-i", "1")
    assert asked == ["1"]


# What is refused


@pytest.mark.parametrize(
    "arguments",
    [
        ["-i", "7"],
        ["-p", "-i", "7"],
        ["-r", "-i", "7"],
        ["device", "--rm", "7"],
        ["device", "--switch", "7"],
        ["device", "--add", "14"],
        ["device", "--add", "0"],
        ["device", "--add", "huge"],
    ],
)
def test_what_does_not_exist_is_refused_and_changes_nothing(smi_refuses, arguments):
    before = accelerators.accelerators()
    smi_refuses(*arguments)
    assert accelerators.accelerators() == before


@pytest.mark.parametrize(
    "arguments",
    [
        ["-i", "x"],
        ["-i"],
        ["-i", "-1"],
        ["device", "--rm", "one"],
        ["--watch", "0"],
        ["--watch", "soon"],
        ["--watch", "nan"],
        ["--watch", "inf"],
        ["device"],
        ["devices", "--list"],
        ["-p", "-t"],
        ["device", "--add", "1", "--rm", "1"],
        ["device", "--list", "-p"],
        ["device", "--add", "1", "--watch", "1"],
        ["device", "--add", "--json"],
        ["--all"],
        ["device", "--add", "1", "--all"],
        ["--hep"],
    ],
)
def test_a_wrong_command_line_is_one_line_that_names_the_help(smi_refuses, arguments):
    line = smi_refuses(*arguments)
    assert line.endswith("See moreh-smi --help.\n")
    assert ids() == [0]


def test_a_sixth_accelerator_is_refused(smi_refuses):
    for _ in range(4):
        accelerators.add(flavor("Small.64GB"))
    assert "5" in smi_refuses("device", "--add", "1")
    assert ids() == [0, 1, 2, 3, 4]
