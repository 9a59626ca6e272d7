"""Starting workers: what they are told, and who may call back."""

import os
import socket
import subprocess
import sys
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client

import pytest

from moai.platform.device import Device
from moai.runtime.launcher import WorkerSpec, cores_of, host_store, worker_environment
from moai.runtime.transport import authenticate
from tests.runtime.programs import cpus


def test_a_spec_survives_its_journey() -> None:
    spec = WorkerSpec(1, 2, Device("cpu", 1, 1 << 30, 4), ("127.0.0.1", 5), ("127.0.0.1", 6), "ab", (4, 5))
    assert WorkerSpec.from_json(spec.to_json()) == spec and "\n" not in spec.to_json()


def test_a_worker_is_plain_pytorch_with_its_own_number_of_threads() -> None:
    environment = worker_environment({"HOME": "/root"}, Device("cpu", 0, 1 << 30, 3))
    assert environment["TORCH_DEVICE_BACKEND_AUTOLOAD"] == "0" and environment["OMP_NUM_THREADS"] == "3"
    assert environment["HOME"] == "/root"


def test_cores_are_shared_out_by_device_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {2, 3, 4, 5})
    devices = [Device("cpu", i, 1 << 30, 2) for i in range(2)]
    assert [cores_of(d, devices) for d in devices] == [(2, 3), (4, 5)]


def test_no_device_is_pinned_when_cores_do_not_suffice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    assert {cores_of(d, cpus(3)) for d in cpus(3)} == {()}


def test_the_meeting_point_listens_on_its_host_alone() -> None:
    store = host_store("127.0.0.1")
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.2", store.port), timeout=1)
    store.set("met", "yes")
    assert store.get("met") == b"yes"


@pytest.mark.parametrize("stranger", ["wrong secret", "says nothing", "hangs up"])
def test_a_caller_without_the_secret_is_turned_away(stranger: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def call() -> None:
            if stranger == "wrong secret":
                with pytest.raises((AuthenticationError, EOFError, OSError)):
                    Client(listener.getsockname(), authkey=b"guess")
            else:
                with socket.create_connection(listener.getsockname()) as s:
                    if stranger == "says nothing":
                        done.wait(5)
                    s.close()

        done = threading.Event()
        caller = threading.Thread(target=call)
        caller.start()
        assert authenticate(listener.accept()[0], b"secret") is None
        done.set()
        caller.join(5)


def test_a_caller_with_the_secret_gets_a_channel() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        caller = threading.Thread(target=lambda: Client(address, authkey=b"secret").send("hello"))
        caller.start()
        channel = authenticate(listener.accept()[0], b"secret")
        assert channel is not None and channel.receive() == "hello"
        caller.join(5)


def test_a_worker_knows_every_operator_of_ours_and_nothing_of_lowering() -> None:
    code = """
import sys, torch, moai.runtime.worker
def ours(): return {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("moai::")}
known, modules = ours(), set(sys.modules)
import moai.session
print(known == ours(), len(known) > 5, "moai.lower.lowering" in modules)
"""
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["True", "True", "False"], done.stderr
