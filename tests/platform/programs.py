"""Other programs of the user, for tests: each takes an accelerator and holds it until it is told to end."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time

SECONDS = 30.0  # the longest that anything here may take

CODE = """
import sys
from moai.platform import accelerators, admission, log
from moai.platform.pool import GB, Machine
log.install()
machine = Machine(cores=2, memory_bytes=23 * GB)
lease = admission.acquire(accelerators.choose(machine=machine), "one plan", machine=machine)
print(lease.job_id, *(d.index for d in lease.devices), flush=True)
{body}
"""
HOLD = "sys.stdin.readline()"


class Program:
    """A program of the user; `environ` says where the state is and what the program is to get."""

    def __init__(self, environ: dict[str, str], body: str = HOLD) -> None:
        self._popen = subprocess.Popen(
            [sys.executable, "-c", CODE.format(body=body)],
            env={**os.environ, "MOREH_LOG_PREFIX": "short", **environ},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        self._out = self._err = b""

    @property
    def pid(self) -> int:
        return self._popen.pid

    def lease(self, seconds: float = SECONDS) -> tuple[int, list[int]] | None:
        """(job id, device indices); None if it has not got them within `seconds`."""
        line = self._read(self._popen.stdout, b"\n", seconds)
        if b"\n" not in line:
            return None
        job_id, *devices = map(int, line.split())
        return job_id, devices

    def said(self, text: str) -> str:
        """Its standard error up to where `text` first stands."""
        assert self._popen.stderr is not None
        deadline = time.monotonic() + SECONDS
        while text.encode() not in self._err:
            self._err += self._read(self._popen.stderr, None, deadline - time.monotonic())
            assert time.monotonic() < deadline, f"{text!r} is not in {self._err.decode()!r}"
        return self._err.decode()

    def waits(self) -> Program:
        """The same, once it is in the queue."""
        self.said("resume automatically")
        return self

    def end(self) -> int:
        """Let it end; its exit status."""
        _, err = self._popen.communicate(b"\n", timeout=SECONDS)
        self._err += err
        return self._popen.returncode

    def signal(self, number: int) -> None:
        self._popen.send_signal(number)

    def kill(self) -> None:
        """As `kill -9`; a zombie stays until `reap`, as under a parent that does not care."""
        self._popen.kill()

    def reap(self) -> None:
        self._popen.kill()
        self._popen.wait(SECONDS)
        for pipe in (self._popen.stdin, self._popen.stdout, self._popen.stderr):
            pipe.close()

    def _read(self, pipe, until: bytes | None, seconds: float) -> bytes:
        deadline, data = time.monotonic() + seconds, b""
        while (left := deadline - time.monotonic()) > 0:
            if not select.select([pipe], [], [], left)[0]:
                break
            piece = os.read(pipe.fileno(), 4096)
            data += piece
            if not piece or until is None or until in data:
                break
        return data
