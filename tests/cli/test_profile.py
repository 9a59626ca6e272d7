"""`moai profile`: the accelerator's devices are measured and what was measured is kept."""

import json
import os

import psutil
import pytest

from moai.cli import app
from moai.plan.profile import Profile
from moai.platform import jobs
from moai.profiling import measuring, stopwatch
from moai.profiling.measuring import Sizes

TINY = Sizes(("fp32",), (8, 16), (16,), (16,), (4096.0,), (4096.0,), ("add", "gelu"))


@pytest.fixture
def tiny(home, monkeypatch):
    """A user with two workers, who has little to measure."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "cache"))
    monkeypatch.setenv("MOAI_DEVICES", "2")
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setitem(measuring.STANDARD, "cpu", TINY)
    return home / "cache" / "moai" / "profiles"


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
