"""`moai doctor`: what is wrong with an environment, and what to do."""

import importlib.metadata
import os
import sqlite3
from pathlib import Path

import pytest

from moai.cli import doctor
from moai.platform import accelerators, flavors, pool, state


@pytest.fixture
def environ(tmp_path):
    return {"XDG_STATE_HOME": str(tmp_path), "HOME": str(tmp_path)}


def installed_except(**other):
    """Versions as they are installed, but for these; None: not installed."""

    def version(name):
        if name not in other:
            return importlib.metadata.version(name)
        if other[name] is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return other[name]

    return version


def test_a_python_that_is_too_old_is_a_problem():
    assert doctor.python((3, 10, 0)).ok
    assert "3.10 or newer" in doctor.python((3, 9, 18)).advice


def test_every_requirement_of_the_package_is_checked():
    checks = {check.name: check for check in doctor.packages()}
    assert {"torch", "psutil", "rich", "click"} <= checks.keys()
    assert all(check.ok for check in checks.values())
    assert checks["torch"].found == importlib.metadata.version("torch")


def test_requirements_of_extras_are_not_checked():
    assert "transformers" not in {check.name for check in doctor.packages()}


@pytest.mark.parametrize("version", ["2.5.1", "3.0.0", None])
def test_another_torch_or_none_is_a_problem(version):
    checks = {check.name: check for check in doctor.packages(installed_except(torch=version))}
    assert not checks["torch"].ok
    assert "pip install" in checks["torch"].advice
    assert checks["rich"].ok


def test_a_build_of_the_right_torch_is_right():
    checks = {check.name: check for check in doctor.packages(installed_except(torch="2.13.0+cu130"))}
    assert checks["torch"].ok


@pytest.mark.parametrize("variable", ["TORCH_DEVICE_BACKEND_AUTOLOAD", "MOAI_CUDA"])
def test_a_switched_off_accelerator_is_a_problem(environ, variable):
    check = doctor.autoload({**environ, "MOAI_FLAVOR": "Small", variable: "0"})
    assert check.advice == f"Unset {variable}."


def test_an_accelerator_that_was_never_chosen_is_a_problem(environ):
    assert "moreh-switch-model" in doctor.autoload(environ).advice
    for variable, value in (("MOAI_FLAVOR", "Small"), ("MOAI_CUDA", "1"), ("MOREH_VISIBLE_DEVICE", "0")):
        assert doctor.autoload({**environ, variable: value}).ok
    accelerators.set_flavor(flavors.available(environ=environ)[0], environ)
    assert doctor.autoload(environ).ok


def test_a_forced_plan_that_the_accelerator_cannot_run_is_a_problem(environ):
    environ["MOAI_DEVICES"] = "2"
    assert doctor.plan(environ) == ()
    assert doctor.plan({**environ, "MOAI_PLAN": "tp=2"}) == (doctor.Check("plan", "dp=1,tp=2"),)
    (check,) = doctor.plan({**environ, "MOAI_PLAN": "tp=3"})
    assert check.advice.endswith('The nearest plan that is possible: "dp=1,tp=2".')


def test_a_package_without_its_entry_point_is_a_problem(environ, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    assert "pip install" in doctor.autoload({**environ, "MOAI_CUDA": "1"}).advice


def test_a_gpu_that_torch_cannot_use_is_a_problem(environ, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_torch_has_cuda", lambda: False)
    monkeypatch.setattr(doctor, "GPU_FILES", (str(tmp_path / "nvidia0"),))
    assert doctor.devices(environ).ok
    (tmp_path / "nvidia0").touch()
    assert "torch" in doctor.devices(environ).advice


def test_shared_memory_as_small_as_a_containers_is_a_problem(tmp_path, monkeypatch):
    usage = type("Usage", (), {"total": 64 * pool.MB})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: usage)
    (check,) = doctor.shared_memory(tmp_path)
    assert "--shm-size" in check.advice
    usage.total = 8 * pool.GB
    assert next(doctor.shared_memory(tmp_path)).ok
    assert not list(doctor.shared_memory(tmp_path / "missing"))


def test_an_unknown_flavor_is_a_problem(environ):
    assert doctor.accelerator(environ).ok
    assert "MOAI_FLAVOR=huge" in doctor.accelerator({**environ, "MOAI_FLAVOR": "huge"}).advice


def test_a_host_without_room_for_the_workers_is_a_problem(environ, monkeypatch):
    monkeypatch.setattr(pool, "probe", lambda *_: pool.Machine(cores=2, memory_bytes=16 * pool.GB))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": pool.GB}))
    assert "smaller flavor" in doctor.memory(environ).advice


def test_a_state_folder_is_made_on_first_use(environ):
    assert doctor.state_folder(environ).ok
    assert doctor.database(environ).ok
    assert not state.database(environ).exists(), "a check changes nothing"


def test_a_state_folder_where_a_file_stands_is_a_problem(environ, tmp_path):
    (tmp_path / "moai").touch()
    assert "XDG_STATE_HOME" in doctor.state_folder(environ).advice


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_state_folder_that_cannot_be_written_is_a_problem(environ, tmp_path):
    tmp_path.chmod(0o500)
    assert "XDG_STATE_HOME" in doctor.state_folder(environ).advice


def test_a_state_folder_that_others_can_write_is_a_problem(environ, tmp_path):
    (tmp_path / "moai").mkdir()
    (tmp_path / "moai").chmod(0o777)
    assert "chmod go-w" in doctor.state_folder(environ).advice


def test_a_damaged_database_is_a_problem(environ):
    path = state.database(environ)
    path.parent.mkdir()
    path.write_bytes(b"This is not a database. " * 100)
    check = doctor.database(environ)
    assert "damaged" in check.found
    assert str(path) in check.advice


def test_an_intact_database_is_right(environ):
    path = state.database(environ)
    path.parent.mkdir()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE things (name TEXT)")
    connection.close()
    assert doctor.database(environ).ok


def test_a_check_that_fails_says_what_to_do():
    assert not doctor.Check("x", "found", "do this").ok
    assert doctor.Check("x", "found").ok
    assert Path(doctor.python((3, 11, 7)).found.split("(")[1].rstrip(")")).exists()
