"""`moreh-switch-model`, line by line."""

import io
import json

import pytest

from moai.cli import switch_model
from moai.platform import accelerators
from moai.platform.errors import AcceleratorError
from tests.cli.conftest import flavor

MENU = """\
1. Small.64GB{0}
2. Medium.128GB{1}
3. Large.256GB
4. xLarge.512GB{2}
5. 1.5xLarge.768GB
6. 2xLarge.1024GB
7. 3xLarge.1536GB
8. 4xLarge.2048GB
9. 6xLarge.3072GB
10. 8xLarge.4096GB
11. 12xLarge.6144GB
12. 24xLarge.12288GB
13. 48xLarge.24576GB{3}
"""
SMALL, MEDIUM, XLARGE, LARGEST = (MENU.format(*("  *" if i == j else "" for i in range(4))) for j in range(4))


@pytest.fixture(autouse=True)
def small(cluster):
    accelerators.set_flavor(flavor("Small.64GB"))


@pytest.fixture
def in_use(monkeypatch):
    """Accelerator 0 runs a program, and the platform refuses to give it another flavor."""

    def refuse(flavor, environ):
        raise AcceleratorError("Accelerator 0 is in use by process 7.")

    (idle,) = accelerators.accelerators()
    usage = accelerators.Usage(0, 0.0, ())
    job = accelerators.RunningJob(1, 7, "python train.py", "", 0.0, usage)
    busy = accelerators.Accelerator(idle.id, idle.flavor, idle.is_default, job)
    monkeypatch.setattr(accelerators, "accelerators", lambda environ: (busy,))
    monkeypatch.setattr(accelerators, "set_flavor", refuse)


def typed(monkeypatch, text):
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def current():
    return accelerators.accelerators()[0].flavor.name


def test_the_dialogue(monkeypatch, capsys):
    typed(monkeypatch, "4\n13\nq\n")
    assert switch_model.main([]) == 0
    assert capsys.readouterr() == (
        f"Current MoAI Accelerator: Small.64GB\n\n{SMALL}\n"
        "Selection (1-13, q, Q): 4\n"
        f'The MoAI Accelerator model is successfully switched to  "xLarge.512GB".\n\n{XLARGE}\n'
        "Selection (1-13, q, Q): 13\n"
        f'The MoAI Accelerator model is successfully switched to  "48xLarge.24576GB".\n\n{LARGEST}\n'
        "Selection (1-13, q, Q): q\n",
        "",
    )
    assert current() == "48xLarge.24576GB"


def test_the_end_of_the_input_leaves_as_q_does(monkeypatch, capsys):
    typed(monkeypatch, "2\n")
    assert switch_model.main([]) == 0
    assert capsys.readouterr().out.endswith(f"{MEDIUM}\nSelection (1-13, q, Q): \n")
    assert current() == "Medium.128GB"


@pytest.mark.parametrize("wrong", ["0", "14", "x", "Large.256GB"])
def test_a_wrong_selection_switches_nothing(monkeypatch, capsys, wrong):
    typed(monkeypatch, f"{wrong}\nq\n")
    assert switch_model.main([]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    assert current() == "Small.64GB"


@pytest.mark.parametrize("argument", ["4", "xLarge.512GB", "xlarge"])
def test_an_argument_switches_at_once(capsys, argument):
    assert switch_model.main([argument]) == 0
    assert capsys.readouterr() == ('The MoAI Accelerator model is successfully switched to  "xLarge.512GB".\n', "")
    assert current() == "xLarge.512GB"


@pytest.mark.parametrize("argument", ["0", "14", "huge", ""])
def test_an_unknown_argument_is_refused(capsys, argument):
    assert switch_model.main([argument]) == 1
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert f'"{argument}"' in err
    assert current() == "Small.64GB"


def test_list_marks_the_current_flavor(capsys):
    assert switch_model.main(["--list"]) == 0
    assert capsys.readouterr().out == SMALL


def test_list_in_json(capsys):
    assert switch_model.main(["--list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert listed["current"] == "Small.64GB"
    assert [f["number"] for f in listed["flavors"]] == list(range(1, 14))


@pytest.mark.parametrize("arguments", [["--list", "4"], ["--json"], ["4", "5"], ["--set", "4"]])
def test_a_wrong_command_line_is_one_line(capsys, arguments):
    assert switch_model.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_it_switches_the_accelerator_that_the_environment_names(monkeypatch, capsys):
    accelerators.add(flavor("Medium.128GB"))
    monkeypatch.setenv("MOREH_VISIBLE_DEVICE", "1")
    typed(monkeypatch, "4\nq\n")
    assert switch_model.main([]) == 0
    assert capsys.readouterr().out.startswith("Current MoAI Accelerator: Medium.128GB\n")
    assert [a.flavor.name for a in accelerators.accelerators()] == ["Small.64GB", "xLarge.512GB"]


@pytest.mark.parametrize("visible", ["7", "x"])
def test_an_environment_that_names_no_accelerator_is_refused(monkeypatch, capsys, visible):
    monkeypatch.setenv("MOREH_VISIBLE_DEVICES", visible)
    assert switch_model.main([]) == 1
    assert f"MOREH_VISIBLE_DEVICES={visible}" in capsys.readouterr().err


def test_in_use_it_is_refused_with_the_line_of_the_original(monkeypatch, capsys, in_use):
    monkeypatch.setenv("MOAI_DEVICE_NAME", "KT AI Accelerator")
    assert switch_model.main(["4"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.endswith(": The model cannot be switched while the KT AI Accelerator is in use.\n")


def test_in_use_the_prompt_refuses_and_asks_again(monkeypatch, capsys, in_use):
    typed(monkeypatch, "4\nq\n")
    assert switch_model.main([]) == 1
    out, err = capsys.readouterr()
    assert err.endswith(": The model cannot be switched while the MoAI Accelerator is in use.\n")
    assert out.endswith("Selection (1-13, q, Q): 4\nSelection (1-13, q, Q): q\n")
