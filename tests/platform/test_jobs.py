"""Jobs get ids that no other program of the user has."""

import os
import subprocess
import sys
import time

from moai.platform import jobs


def test_a_job_is_known_from_start_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["python", "train.py", "--name", "a b"])
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    before = time.time()
    job = jobs.start("Small.4GB", environ)
    assert jobs.history(environ) == (job,)
    assert (job.command, job.pid, job.flavor) == ("python train.py --name 'a b'", os.getpid(), "Small.4GB")
    assert before <= job.started <= time.time()
    assert job.ended is None
    job.end(environ)
    (ended,) = jobs.history(environ)
    assert ended.ended is not None and ended.ended >= ended.started


def test_programs_that_start_at_once_get_different_ids(tmp_path):
    code = "from moai.platform import jobs; print(jobs.start('Small.4GB').id)"
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    programs = [
        subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    ids = [p.communicate(timeout=60)[0].strip() for p in programs]
    assert sorted(ids) == ["1", "2", "3", "4", "5", "6"]


def test_an_id_is_never_given_twice(tmp_path):
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    first = jobs.start("Small.4GB", environ)
    first.end(environ)
    assert jobs.start("Small.4GB", environ).id != first.id


def test_a_state_folder_that_cannot_be_written_costs_the_id_only(tmp_path, caplog, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setattr(jobs.logger, "propagate", True)
    assert jobs.start("Small.4GB", {"XDG_STATE_HOME": str(file)}) is None
    assert len(caplog.records) == 1
    assert "Set XDG_STATE_HOME" in caplog.text


def test_without_xdg_state_home_the_state_lies_under_home(tmp_path):
    jobs.start("Small.4GB", {"HOME": str(tmp_path)})
    assert (tmp_path / ".local" / "state" / "moai" / "state.sqlite3").exists()
