"""What tests of what scripts see have in common: an accelerator in this process, and torch without one in another."""

import contextlib
import subprocess
import sys

import torch

from moai import session
from moai.device import alias
from tests.capture.inline import InlineExecutor


@contextlib.contextmanager
def accelerator():
    """Turns the alias on and lets the process's session compute here instead of on workers."""
    assert alias.turn_on()
    torch.cuda.init()
    recorder, executor = session.current().recorder, InlineExecutor()
    before = recorder.execute, recorder.fetch, recorder.resident
    recorder.execute, recorder.fetch, recorder.resident = executor.execute, executor.fetch, lambda tensor: None
    try:
        yield
    finally:
        recorder.execute, recorder.fetch, recorder.resident = before


def said_by_plain_torch(code):
    """What `code` prints in a process whose torch knows no accelerator."""
    return subprocess.run(
        [sys.executable, "-c", code],
        env={"TORCH_DEVICE_BACKEND_AUTOLOAD": "0"},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    ).stdout.strip()
