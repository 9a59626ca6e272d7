"""Fixtures of the commands' tests."""

from pathlib import Path

import pytest

from moai.platform import config, flavors

EXAMPLE = Path(config.__file__).with_name("flavors_mi250.toml")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A user of this machine who has never used an accelerator."""
    for name in ("MOAI_FLAVOR", "MOAI_DEVICES", "MOAI_CONFIG", "MOAI_DEVICE_NAME", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)
    for name in ("MOREH_VISIBLE_DEVICE", "MOREH_VISIBLE_DEVICES", "MOREH_SDA_TOKEN", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "XDG_STATE_HOME", "XDG_CONFIG_HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    return tmp_path


@pytest.fixture
def cluster(home, monkeypatch):
    """The same user, on the cluster of the shipped example: the 13 flavors of the original."""
    monkeypatch.setenv("MOAI_CONFIG", str(EXAMPLE))
    return home


@pytest.fixture
def says(capsys):
    """A function: what a command's `main` with these arguments prints; it must succeed, and say nothing on stderr."""

    def run(main, *arguments):
        assert main(list(arguments)) == 0
        out, err = capsys.readouterr()
        assert err == ""
        return out

    return run


def flavor(name):
    """One of the shipped example."""
    return flavors.find(name, flavors.available(environ={"MOAI_CONFIG": str(EXAMPLE)}))
