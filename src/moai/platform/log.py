"""The lines a starting program prints about its accelerator.

Out: records of the logger "moai", on stderr, because stdout belongs to the script. A program that configures that
logger itself (any handler on it) gets the records and prints them its own way.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping
from typing import TextIO

from moai.version import __version__

DEFAULT_DEVICE_NAME = "MoAI Accelerator"

logger = logging.getLogger("moai")


def display_name(environ: Mapping[str, str] = os.environ) -> str:
    """What the accelerator calls itself: MOAI_DEVICE_NAME, or "MoAI Accelerator"."""
    return environ.get("MOAI_DEVICE_NAME") or DEFAULT_DEVICE_NAME


class Formatter(logging.Formatter):
    """`[2024-06-25 10:00:00.123] [info] text`; only `[info] text` where MOREH_LOG_PREFIX=short."""

    def format(self, record: logging.LogRecord) -> str:
        text = f"[{record.levelname.lower()}] {record.getMessage()}"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if os.environ.get("MOREH_LOG_PREFIX") == "short":
            return text
        return f"[{self.formatTime(record, '%Y-%m-%d %H:%M:%S')}.{int(record.msecs):03d}] {text}"


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what `sys.stderr` is now, not to what it was when torch was imported."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)
        self.setFormatter(Formatter())

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


def install() -> None:
    """Print the logger's records, unless the program has its own handler on it. Calling it again changes nothing."""
    if logger.handlers:
        return
    logger.addHandler(_Stderr())
    logger.propagate = False
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.INFO)


def requesting() -> None:
    logger.info("Requesting resources for %s from the server...", display_name())


def initializing() -> None:
    logger.info("Initializing the worker daemon for %s", display_name())


def connecting(index: int, count: int, address: str) -> None:
    """`index` counts from 1 to `count`; `address` is IP:PORT."""
    logger.info("[%d/%d] Connecting to resources on the server (%s)...", index, count, address)


def establishing() -> None:
    logger.info("Establishing links to the resources...")


def ready(job_id: int | None) -> None:
    """`job_id` is None where the job could not be registered."""
    logger.info("%s is ready to use.", display_name())
    logger.info("Moreh Version: %s", __version__)
    if job_id is not None:
        logger.info("Moreh Job ID: %d", job_id)
