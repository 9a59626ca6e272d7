import logging

import pytest

from moai.platform.log import logger
from tests.platform.programs import HOLD, Program


@pytest.fixture
def fresh_logger(monkeypatch):
    """The platform's logger as a program finds it: no handlers, no level."""
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    logger.manager._clear_cache()
    yield
    logger.manager._clear_cache()


@pytest.fixture
def environ(tmp_path):
    """An environment with a state of its own."""
    return {"XDG_STATE_HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path / "config")}


@pytest.fixture
def start(environ):
    """`start(MOAI_DEVICES="2", body="...")` starts a program that takes an accelerator."""
    programs = []

    def start(body=HOLD, **variables):
        programs.append(Program({**environ, **variables}, body))
        return programs[-1]

    yield start
    for program in programs:
        program.reap()
