"""`moai profile`: the accelerator's devices are measured and what was measured is kept."""

import json
import os

import psutil
import pytest

from moai.cli import app
from moai.plan.profile import Profile, Table
from moai.platform import jobs
from moai.profiling import layers, measuring, stopwatch
from moai.profiling.measuring import Sizes

MODEL = {
    "model_type": "qwen2",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TINY = Sizes(("fp32",), (8, 16), (16,), (16,), (4096.0,), (4096.0,), ("add", "gelu"))


@pytest.fixture
def tiny(home, monkeypatch):
    """A user with two workers, who has little to measure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("MOAI_DEVICES", "2")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(measuring.STANDARD, "cpu", TINY)
    return home / "cache" / "moai" / "profiles"


@pytest.fixture
def quick(tiny, monkeypatch):
    """The devices are not measured; tells how often they would have been."""
    measured = []

    def run(measurement, advance):
        measured.append(1)
        tables = {"stream add": Table(((1e3, 1e6),), (1e-6, 1e-3))}
        return Profile(measurement._hardware, "2026-01-01", 1e-6 * len(measured), 0.5, tables)

    monkeypatch.setattr(measuring.Measurement, "run", run)
    monkeypatch.setattr(layers, "ROUNDS", 1)
    return measured


@pytest.fixture
def model(tmp_path):
    """What names the step of a small model."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(MODEL))
    return ["--model", str(file), "--batch-size", "2", "--block-size", "16"]


def kept(folder):
    return [] if not folder.exists() else list(folder.iterdir())


def test_the_devices_are_measured_and_the_file_is_named(tiny, capsys):
    assert app.main(["profile"]) == 0
    out = capsys.readouterr().out
    (file,) = kept(tiny)
    profile = Profile.from_json(json.loads(file.read_text()))
    assert profile.hardware.devices == 2
    assert str(file) in out
    assert profile.hardware.model in out
    for line in ("matrix products fp32", "attention backward fp32", "all_reduce 2 waited", "a call"):
        assert line in out
    (job,) = jobs.history()
    assert job.ended is not None and job.plan == "profile"


def test_it_can_be_had_as_json(tiny, capsys):
    assert app.main(["profile", "--json"]) == 0
    (file,) = kept(tiny)
    assert Profile.from_json(json.loads(capsys.readouterr().out)) == Profile.from_json(json.loads(file.read_text()))


def test_an_interruption_leaves_no_file_no_worker_and_no_job(tiny, monkeypatch):
    begun = []

    def interrupted(self, case):
        begun.append(case)
        if len(begun) == 3:
            raise KeyboardInterrupt
        return 1e-3

    before = set(psutil.Process().children())
    monkeypatch.setattr(stopwatch.Stopwatch, "of_case", interrupted)
    assert app.main(["profile"]) == 130
    assert kept(tiny) == []
    assert set(psutil.Process().children()) <= before
    (job,) = jobs.history()
    assert job.ended is not None


def test_the_environment_is_as_it_was(tiny, monkeypatch):
    monkeypatch.setenv("MOAI_COMPILE", "always")
    monkeypatch.setattr(measuring.Measurement, "run", lambda self, advance: (_ for _ in ()).throw(RuntimeError("lost")))
    assert app.main(["profile"]) == 1
    assert os.environ["MOAI_COMPILE"] == "always"


@pytest.mark.parametrize("n", ["0", "1000000"])
def test_devices_that_there_are_not_are_refused(tiny, monkeypatch, capsys, n):
    monkeypatch.setenv("MOAI_DEVICES", n)
    assert app.main(["profile"]) == 1
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert kept(tiny) == []


def test_a_cache_that_cannot_be_written_is_said(tiny, monkeypatch, capsys):
    tiny.parent.mkdir(parents=True)
    tiny.write_text("")
    assert app.main(["profile"]) == 1
    assert str(tiny) in capsys.readouterr().err


def test_the_layers_of_a_model_are_measured_and_planned_with(tiny, quick, model, capsys):
    assert app.main(["profile", *model]) == 0
    (file,) = kept(tiny)
    first = Profile.from_json(json.loads(file.read_text()))
    assert {"matmul", "attention", "stream", "all_reduce"} <= {task.kind for task in first.tasks}
    assert f"{len(first.tasks):,}" in capsys.readouterr().out
    assert app.main(["plan", *model]) == 0
    assert "as measured on these devices, 100% of the step in layers of this model" in capsys.readouterr().out
    assert app.main(["profile"]) == 0
    again = Profile.from_json(json.loads(file.read_text()))
    assert again.tasks == first.tasks and again.call_s > first.call_s, "the devices alone were measured again"


def test_a_scripts_layers_are_measured_as_it_is_planned(tiny, quick, home):
    (home / "train.py").write_text(
        """
import sys, torch
assert sys.argv[1:] == ["--batch-size", "4"]
model = torch.nn.Linear(8, 8).cuda()
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(4, 8).cuda()).sum().backward()
optimizer.step()
model.weight.sum().item()
raise AssertionError("this ran")
"""
    )
    for arguments in ([], [str(home / "train.py"), "--batch-size", "4"]):
        assert app.main(["profile", *arguments]) == 0
    (file,) = kept(tiny)
    assert Profile.from_json(json.loads(file.read_text())).tasks
    assert len(quick) == 1, "the devices had been measured"


@pytest.mark.parametrize(
    ("arguments", "status", "part"),
    [
        (["nosuch.py"], 1, "nosuch.py: there is no such file"),
        (["--model", "nosuch/config.json", "--batch-size", "2", "--block-size", "8"], 1, "nosuch/config.json"),
        (["--model", "m", "--batch-size", "2"], 2, "--model needs --batch-size and --block-size"),
        (["--batch-size", "2"], 2, "go with --model"),
        (["--model", "m", "train.py"], 2, "not both"),
        (["--nonsense"], 2, "--nonsense"),
    ],
)
def test_what_names_no_step_is_refused_in_one_line_before_anything_is_measured(
    tiny, quick, capsys, arguments, status, part
):
    assert app.main(["profile", *arguments]) == status
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "[info]" not in line]
    assert out == "" and part in line
    assert not quick and not kept(tiny) and not jobs.history()
