"""Jobs get ids that no other program of the user has."""

import os
import subprocess
import sys
import time

from moai.platform import jobs


def test_a_job_is_known_from_start_to_end(tmp_path):
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    before = time.time()
    job_id = jobs.start("train.py --lr 1", "Small.4GB", environ)
    (running,) = jobs.history(environ)
    assert (running.id, running.command, running.pid) == (job_id, "train.py --lr 1", os.getpid())
    assert before <= running.started <= time.time()
    assert running.ended is None
    jobs.finish(job_id, environ)
    (ended,) = jobs.history(environ)
    assert ended.ended is not None and ended.ended >= ended.started


def test_programs_that_start_at_once_get_different_ids(tmp_path):
    code = "from moai.platform import jobs; print(jobs.start('x', 'Small.4GB'))"
    environ = {**os.environ, "XDG_STATE_HOME": str(tmp_path)}
    programs = [
        subprocess.Popen([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, text=True) for _ in range(6)
    ]
    ids = [p.communicate(timeout=60)[0].strip() for p in programs]
    assert sorted(ids) == ["1", "2", "3", "4", "5", "6"]


def test_an_id_is_never_given_twice(tmp_path):
    environ = {"XDG_STATE_HOME": str(tmp_path)}
    first = jobs.start("a", "Small.4GB", environ)
    jobs.finish(first, environ)
    assert jobs.start("b", "Small.4GB", environ) != first


def test_a_state_folder_that_cannot_be_written_costs_the_id_only(tmp_path, caplog, monkeypatch):
    file = tmp_path / "file"
    file.write_text("")
    environ = {"XDG_STATE_HOME": str(file)}
    monkeypatch.setattr(jobs.logger, "propagate", True)
    assert jobs.start("x", "Small.4GB", environ) is None
    jobs.finish(None, environ)
    assert len(caplog.records) == 1
    assert "Set XDG_STATE_HOME" in caplog.text


def test_without_xdg_state_home_the_state_lies_under_home(tmp_path):
    jobs.start("x", "Small.4GB", {"HOME": str(tmp_path)})
    assert (tmp_path / ".local" / "state" / "moai" / "state.sqlite3").exists()
