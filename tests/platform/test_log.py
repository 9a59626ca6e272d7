"""The lines of a starting program."""

import logging
import re

import pytest

from moai.platform import log
from moai.platform.errors import memory_error
from moai.version import __version__

pytestmark = pytest.mark.usefixtures("fresh_logger")


def start(job_id=7):
    log.requesting()
    log.initializing()
    log.connecting(["10.0.0.1:24001", "10.0.0.1:24002", "10.0.0.2:24001", "10.0.0.2:24002"])
    log.establishing()
    log.ready(job_id)


START = [
    "[info] Requesting resources for MoAI Accelerator from the server...",
    "[info] Initializing the worker daemon for MoAI Accelerator",
    "[info] [1/2] Connecting to resources on the server (10.0.0.1:24001)...",
    "[info] [2/2] Connecting to resources on the server (10.0.0.2:24001)...",
    "[info] Establishing links to the resources...",
    "[info] MoAI Accelerator is ready to use.",
    f"[info] Moreh Version: {__version__}",
    "[info] Moreh Job ID: 7",
]


def test_a_start_prints_its_lines_on_stderr_only(capsys, monkeypatch):
    monkeypatch.setenv("MOREH_LOG_PREFIX", "short")
    log.install()
    start()
    out, err = capsys.readouterr()
    assert err.splitlines() == START
    assert out == ""


def test_lines_carry_the_time(capsys, monkeypatch):
    monkeypatch.delenv("MOREH_LOG_PREFIX", raising=False)
    log.install()
    start()
    for line in capsys.readouterr().err.splitlines():
        assert re.match(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}\] \[info\] \S", line)


def test_without_a_job_id_no_id_is_printed(capsys):
    log.install()
    start(job_id=None)
    assert "Job ID" not in capsys.readouterr().err


def test_the_accelerator_is_called_what_the_operator_calls_it(capsys, monkeypatch):
    monkeypatch.setenv("MOAI_DEVICE_NAME", "Our Accelerator")
    log.install()
    start()
    err = capsys.readouterr().err
    assert "Our Accelerator is ready to use." in err
    assert "MoAI Accelerator" not in err


def test_levels_have_lower_case_names(capsys):
    log.install()
    log.logger.warning("careful")
    assert "[warning] careful" in capsys.readouterr().err


def test_installing_twice_prints_once(capsys):
    log.install()
    log.install()
    log.requesting()
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_program_with_its_own_handler_keeps_it(capsys):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    log.logger.addHandler(handler)
    log.logger.setLevel(logging.INFO)
    log.install()
    log.requesting()
    assert len(records) == 1
    assert capsys.readouterr().err == ""


def test_out_of_memory_says_how_much_was_asked_for_and_what_to_do():
    text = str(memory_error(75_051_597_828, 68_702_699_520))
    assert text.startswith("Error Code 4: OUT_OF_MEMORY")
    assert ">> Memory requested : 75,051,597,828 bytes" in text
    assert ">> Memory available : 68,702,699,520 bytes" in text
    assert "1. " in text and "2. " in text
    assert "3. " not in text


def test_out_of_memory_names_a_plan_that_fits_if_one_is_known():
    assert '  3. Use the plan that is nearest and fits this step: MOAI_PLAN="dp=2,micro=2".\n' in str(
        memory_error(2, 1, 'MOAI_PLAN="dp=2,micro=2"')
    )
