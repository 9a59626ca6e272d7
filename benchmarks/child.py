"""Child processes that do the measured work, one a variant, so that none measures another's heap, threads or caches.

In: the name of a function in `benchmarks`, its settings, an environment. Out: messages over a pipe. A child that has
nothing to do sleeps in a blocking read, and it ends when its parent closes the pipe or dies.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
_END_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Failure:
    """What a child sends instead of an answer: the traceback of its error."""

    text: str


class Child:
    """A process that runs `function` (as "module:name", called with its end of the pipe and with the settings)."""

    def __init__(self, name: str, function: str, settings: Mapping[str, Any], environment: Mapping[str, str]) -> None:
        self.name = name
        self.connection, theirs = Pipe()
        self._output = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        # Not by `-m`: the classes of messages would then belong to another module there.
        program = "from benchmarks.child import main; main()"
        command = [sys.executable, "-c", program, str(theirs.fileno()), function, json.dumps(settings)]
        self._process = subprocess.Popen(
            command,
            env={**environment, "PYTHONPATH": str(ROOT)},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=self._output,
        )
        theirs.close()

    def send(self, message: Any) -> None:
        """Send it a message; that it has died is found out by the next `receive`."""
        with contextlib.suppress(BrokenPipeError):
            self.connection.send(message)

    def receive(self, timeout: float) -> Any:
        """Its next message. RuntimeError, with its last words, if it fails, ends or takes over `timeout` seconds."""
        try:
            if not self.connection.poll(timeout):
                raise RuntimeError(f"{self.name} gave no answer for {timeout:.0f} s\n{self._last_words()}")
            message = self.connection.recv()
        except (EOFError, OSError):
            self.close()
            status = self._process.returncode
            raise RuntimeError(f"{self.name} ended with status {status}\n{self._last_words()}") from None
        if isinstance(message, Failure):
            raise RuntimeError(f"{self.name} failed\n{message.text}")
        return message

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def close(self) -> None:
        """Let it end; kill it if it does not within seconds."""
        self.connection.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_words(self) -> str:
        size = self._output.seek(0, os.SEEK_END)
        self._output.seek(max(0, size - 2000))
        return self._output.read().decode(errors="replace").strip()


def receive_all(children: Sequence[Child], timeout: float) -> list[Any]:
    """The next message of each, all within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    return [child.receive(max(0.0, deadline - time.monotonic())) for child in children]


def main() -> None:
    """The child's side: argv is the pipe's file descriptor, the function and its settings."""
    connection = Connection(int(sys.argv[1]))
    module, name = sys.argv[2].split(":")
    try:
        getattr(importlib.import_module(module), name)(connection, **json.loads(sys.argv[3]))
    except (EOFError, BrokenPipeError):
        pass  # the parent has closed the pipe, or is gone
    except Exception:
        connection.send(Failure(traceback.format_exc()))
