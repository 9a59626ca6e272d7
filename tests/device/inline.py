"""The accelerator with an executor in this process, for tests of what scripts see."""

import contextlib

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
    before = recorder.execute, recorder.fetch
    recorder.execute, recorder.fetch = executor.execute, executor.fetch
    try:
        yield
    finally:
        recorder.execute, recorder.fetch = before
