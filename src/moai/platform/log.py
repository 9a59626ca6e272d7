"""The lines a starting program prints about its accelerator.

Out: records of the logger "moai", on stderr, because stdout belongs to the script. A program that configures that
logger itself (any handler on it) gets the records and prints them its own way.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TextIO

from moai.platform import config
from moai.version import __version__

DEFAULT_DEVICE_NAME = "MoAI Accelerator"
DOT_SECONDS = 1.0

logger = logging.getLogger("moai")


def display_name(environ: Mapping[str, str] = os.environ) -> str:
    """What the accelerator calls itself: MOAI_DEVICE_NAME, what the operator's file says, or "MoAI Accelerator"."""
    return environ.get("MOAI_DEVICE_NAME") or config.load(environ).display_name or DEFAULT_DEVICE_NAME


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


def planning() -> None:
    """A plan will be chosen, from what is known of the hardware."""
    logger.info("Got DBs from backend for auto config.")


def requesting() -> None:
    logger.info("Requesting resources for %s from the server...", display_name())


def in_use(pid: int, command: str) -> None:
    """This program waits for the process `pid`, which runs `command` on the same accelerator."""
    name = display_name()
    logger.warning("%s is already in use by another process:", name)
    logger.warning("  (pid: %d) %s", pid, command)
    logger.warning(
        "Two or more processes cannot use %s at the same time. The program will resume automatically after the"
        " process %d terminates...",
        name,
        pid,
    )
    logger.warning(
        'If that process should not be running, end it with "moreh-smi --reset"; it may take 1-2 times. Another'
        " accelerator is chosen with MOREH_VISIBLE_DEVICE."
    )


def pool_full() -> None:
    """This program waits until others release devices."""
    logger.warning(
        "Not enough resources are currently available for %s. All resources in the system are being used by other"
        " users. The program will resume automatically when resources become available...",
        display_name(),
    )


class Dots:
    """One dot a second on stderr while something is waited for; the line ends with the wait."""

    def __init__(self) -> None:
        self._open = False
        self._last = time.monotonic()

    def __enter__(self) -> Dots:
        return self

    def __exit__(self, *_: object) -> None:
        self.interrupt()

    def advance(self) -> None:
        """Call this several times a second."""
        if time.monotonic() - self._last >= DOT_SECONDS:
            self._last = time.monotonic()
            self._open = True
            print(".", end="", file=sys.stderr, flush=True)

    def interrupt(self) -> None:
        """End the line, for something else to be printed."""
        if self._open:
            self._open = False
            print(file=sys.stderr, flush=True)


def initializing() -> None:
    logger.info("Initializing the worker daemon for %s", display_name())


def connecting(addresses: Sequence[str]) -> None:
    """One line a node; `addresses` are the workers', each "ip:port"."""
    nodes: dict[str, str] = {}
    for address in addresses:
        nodes.setdefault(address.rpartition(":")[0], address)
    for i, address in enumerate(nodes.values(), 1):
        logger.info("[%d/%d] Connecting to resources on the server (%s)...", i, len(nodes), address)


def establishing() -> None:
    logger.info("Establishing links to the resources...")


def ready(job_id: int | None) -> None:
    """`job_id` is None where the job could not be registered."""
    logger.info("%s is ready to use.", display_name())
    logger.info("Moreh Version: %s", __version__)
    if job_id is not None:
        logger.info("Moreh Job ID: %d", job_id)
