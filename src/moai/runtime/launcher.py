"""Launchers: how the worker processes of an accelerator come to be, and go.

In: devices. Out: `Worker`s, each connected and ready, with its process's fate.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch.distributed import TCPStore

from moai.platform.device import Device
from moai.runtime.messages import Failed, Hello, Ready
from moai.runtime.transport import Channel, authenticate

_TICK = 0.05


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """All that a worker is told at its start; `to_json` is the line that it reads from its standard input.

    `controller` and `store` are (host, port) of the controller and of the workers' meeting point, `secret` proves to
    the controller that the caller is its worker, and `cores` are the CPU cores to stay on (empty: any).
    """

    rank: int
    size: int
    device: Device
    controller: tuple[str, int]
    store: tuple[str, int]
    secret: str
    cores: tuple[int, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(line: str) -> WorkerSpec:
        fields: dict[str, Any] = json.loads(line)
        fields["device"] = Device(**fields["device"])
        for name in ("controller", "store", "cores"):
            fields[name] = tuple(fields[name])
        return WorkerSpec(**fields)


class Process(Protocol):
    """A worker's process, wherever it runs."""

    def end(self) -> str | None:
        """How it ended, in words that follow "the worker"; None while it lives."""

    def last_words(self) -> str:
        """The end of what it wrote to its standard error."""


@dataclass(frozen=True, slots=True)
class Worker:
    """A worker that is ready. `address` is its end of the connection, as "ip:port"."""

    rank: int
    device: Device
    pid: int
    address: str
    channel: Channel
    process: Process


class Launcher(Protocol):
    """Starts one worker a device, and stops them."""

    def start(self, devices: Sequence[Device], timeout: float) -> list[Worker]:
        """The ready workers, in the order of `devices`. RuntimeError when it fails or takes over `timeout` seconds,
        with nothing left running."""

    def stop(self, grace: float) -> None:
        """Ends what is left of the workers after `grace` seconds; none is there on return."""


class LocalLauncher:
    """Workers are child processes on this machine; all traffic stays on the loopback interface."""

    HOST = "127.0.0.1"

    def __init__(self) -> None:
        self._children: list[_Child] = []
        self._store: TCPStore | None = None  # to be served as long as there are workers: they meet in ever new groups

    def start(self, devices: Sequence[Device], timeout: float) -> list[Worker]:
        deadline = time.monotonic() + timeout
        secret = secrets.token_bytes(32)
        try:
            with socket.create_server((self.HOST, 0), backlog=len(devices)) as listener:
                self._store = store = host_store(self.HOST)
                for rank, device in enumerate(devices):
                    spec = WorkerSpec(
                        rank=rank,
                        size=len(devices),
                        device=device,
                        controller=(self.HOST, listener.getsockname()[1]),
                        store=(self.HOST, store.port),
                        secret=secret.hex(),
                        cores=cores_of(device, devices),
                    )
                    self._children.append(_Child(spec))
                return connect_workers(listener, devices, self._children, secret, deadline)
        except BaseException:
            self.stop(grace=0)
            raise

    def stop(self, grace: float) -> None:
        deadline = time.monotonic() + grace
        for child in self._children:
            child.stop(max(0.0, deadline - time.monotonic()))
        self._children.clear()
        self._store = None


class _Child:
    """A worker as a child process of this one."""

    def __init__(self, spec: WorkerSpec) -> None:
        # Standard error is kept for error messages, in a file without a name: N workers' warnings are not the user's.
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child is of interest
        self._popen = subprocess.Popen(
            [sys.executable, "-m", "moai.runtime.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=self._stderr,
            env=worker_environment(os.environ, spec.device),
            # Out of reach of the terminal's Ctrl-C and Ctrl-Z, from the first instant on.
            start_new_session=True,
        )
        assert self._popen.stdin is not None
        try:
            with self._popen.stdin as stdin:
                stdin.write(spec.to_json().encode() + b"\n")
        except BrokenPipeError:
            pass  # it died at once: whoever waits for it will find out how

    def end(self) -> str | None:
        code = self._popen.poll()
        if code is None:
            return None
        if code >= 0:
            return f"exited with status {code}"
        return f"was killed by signal {-code} ({signal.Signals(-code).name})"

    def last_words(self) -> str:
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - 2000))
        return self._stderr.read().decode(errors="replace").strip()

    def stop(self, grace: float) -> None:
        try:
            self._popen.wait(grace)
        except subprocess.TimeoutExpired:
            self._popen.kill()
            self._popen.wait()


def worker_environment(base: Mapping[str, str], device: Device) -> dict[str, str]:
    """The environment of a worker of `device` on this machine."""
    return {
        **base,
        # A worker is plain PyTorch: neither the accelerator's backend nor a `torch.py` of the user may load there.
        "TORCH_DEVICE_BACKEND_AUTOLOAD": "0",
        "PYTHONSAFEPATH": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": str(device.threads),
        "TORCH_CPP_LOG_LEVEL": base.get("TORCH_CPP_LOG_LEVEL", "ERROR"),
        # glibc gives freed memory back to the system, and a step then pays tens of thousands of page faults for the
        # same memory again. A worker keeps it, of any size; huge pages were tried instead, and were slower.
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TOP_PAD_": str(64 << 20),
        "MALLOC_ARENA_MAX": "1",
    }


def cores_of(device: Device, devices: Sequence[Device]) -> tuple[int, ...]:
    """The cores for a CPU device to stay on: a fixed part of those we may use if all of `devices` have one."""
    if device.kind != "cpu" or not hasattr(os, "sched_getaffinity"):
        return ()
    usable = sorted(os.sched_getaffinity(0))
    if max((d.index + 1) * d.threads for d in devices) > len(usable):
        return ()
    return tuple(usable[device.index * device.threads : (device.index + 1) * device.threads])


def host_store(host: str) -> TCPStore:
    """A store at a free port of `host`, where the workers exchange addresses; served by this process."""
    listener = socket.create_server((host, 0), backlog=512)
    port = listener.getsockname()[1]
    return TCPStore(host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())


def connect_workers(
    listener: socket.socket, devices: Sequence[Device], processes: Sequence[Process], secret: bytes, deadline: float
) -> list[Worker]:
    """Waits until every process has called back at `listener` and is ready; RuntimeError if one cannot."""
    workers: dict[int, Worker] = {}
    listener.settimeout(_TICK)
    while len(workers) < len(devices):
        for rank, process in enumerate(processes):
            _check_start(rank, devices[rank], process, deadline)
        try:
            caller, (host, port, *_) = listener.accept()
        except TimeoutError:
            continue
        channel = authenticate(caller, secret)
        if channel is not None:
            hello: Hello = channel.receive()
            process = processes[hello.rank]
            workers[hello.rank] = Worker(hello.rank, devices[hello.rank], hello.pid, f"{host}:{port}", channel, process)
    in_order = [workers[rank] for rank in range(len(devices))]
    for worker in in_order:
        _await_ready(worker, deadline)
    return in_order


def _await_ready(worker: Worker, deadline: float) -> None:
    while not worker.channel.poll(_TICK):
        _check_start(worker.rank, worker.device, worker.process, deadline)
    try:
        reply = worker.channel.receive()
    except (EOFError, OSError):
        # Its process is ending: wait for the reason.
        while True:
            _check_start(worker.rank, worker.device, worker.process, deadline)
            time.sleep(_TICK)
    if isinstance(reply, Failed):
        raise RuntimeError(f"device {worker.rank} ({worker.device}) cannot be used: {reply.text}")
    assert isinstance(reply, Ready), reply


def _check_start(rank: int, device: Device, process: Process, deadline: float) -> None:
    end = process.end()
    if end is not None:
        raise RuntimeError(
            f"the worker of device {rank} ({device}) {end} while starting\n{process.last_words()}".rstrip()
        )
    if time.monotonic() > deadline:
        raise RuntimeError(
            f"the worker of device {rank} ({device}) was not ready in time: is the machine overloaded?\n"
            f"{process.last_words()}".rstrip()
        )
