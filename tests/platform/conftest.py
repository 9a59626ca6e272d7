import logging

import pytest

from moai.platform.log import logger


@pytest.fixture
def fresh_logger(monkeypatch):
    """The platform's logger as a program finds it: no handlers, no level."""
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", True)
    monkeypatch.setattr(logger, "level", logging.NOTSET)
    logger.manager._clear_cache()
    yield
    logger.manager._clear_cache()
