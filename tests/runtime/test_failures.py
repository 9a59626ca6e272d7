"""Whatever happens to a worker is an error that explains itself, and no worker outlives its script."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence

import psutil
import pytest
import torch

from moai.graph.step_graph import Ref
from moai.platform.device import Device
from moai.runtime.accelerator import Accelerator
from moai.runtime.messages import Failed
from tests.runtime.programs import busy_seconds, cpus, f32, increment, op, program, put, slot


def gone(pids: Sequence[int], within: float) -> bool:
    """Whether the processes end within so many seconds."""
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not any(_alive(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def pids(accelerator: Accelerator) -> list[int]:
    return [link.worker.pid for link in accelerator._links]


def big_input(accelerator: Accelerator):
    return put(accelerator, torch.zeros(4000, 4000))


# A worker fails.


def test_an_operator_error_names_device_step_operator_and_line(doomed: Accelerator) -> None:
    check = op("aten._assert_async.msg", Ref(1), "not all are set", where="train.py:33")
    p = program(2, [slot(0, f32(2))], [], op("aten.all.default", Ref(0), outs=1), check)
    doomed.run(p, [put(doomed, torch.ones(2))], [])
    doomed.run(p, [put(doomed, torch.zeros(2))], [])
    expected = (
        r"device [01] \(cpu:[01], pid \d+\) failed in step 2: operator aten._assert_async.msg .*train.py:33.*not all"
    )
    with pytest.raises(RuntimeError, match=expected):
        doomed.synchronize()


def test_after_a_failure_every_call_raises_it_and_the_workers_are_gone(doomed: Accelerator) -> None:
    x = put(doomed, torch.ones(2))
    doomed.run(program(2, [], [], op("aten.frobnicate.default")), [], [])
    for call in (doomed.synchronize, lambda: doomed.read(x), lambda: put(doomed, torch.ones(1))):
        with pytest.raises(RuntimeError, match=r"no operator aten\.frobnicate\.default"):
            call()
    assert gone(pids(doomed), within=5)


def test_a_worker_killed_in_a_run_is_named_with_the_cause(doomed: Accelerator) -> None:
    doomed.run(busy_seconds(2), [big_input(doomed)], [])
    time.sleep(0.5)
    os.kill(pids(doomed)[1], signal.SIGKILL)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"device 1 .*lost in step 1: .*killed by signal 9 \(SIGKILL\)(.|\n)*memory"):
        doomed.synchronize()
    assert time.monotonic() - start < 5
    assert gone(pids(doomed), within=5)


def test_a_dead_worker_is_blamed_though_its_peer_complains_first(doomed: Accelerator) -> None:
    doomed._on_reply(0, Failed("connection closed by peer", in_collective=True))
    os.kill(pids(doomed)[1], signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(RuntimeError, match=r"device 1 .*SIGKILL"):
        doomed.synchronize()


def test_a_failed_collective_is_the_error_when_nothing_explains_it(doomed: Accelerator) -> None:
    doomed._on_reply(0, Failed("connection closed by peer", in_collective=True))
    time.sleep(4)
    with pytest.raises(RuntimeError, match=r"device 0 .*connection closed by peer"):
        doomed.synchronize()


def test_a_worker_killed_between_runs_is_noticed_at_the_next_call(doomed: Accelerator) -> None:
    os.kill(pids(doomed)[0], signal.SIGKILL)
    time.sleep(0.5)
    with pytest.raises(RuntimeError, match=r"device 0 .*SIGKILL"):
        put(doomed, torch.ones(1))


@pytest.mark.parametrize("at", ["run", "upload"])
def test_a_stopped_worker_is_noticed(doomed: Accelerator, at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moai.runtime.watchdog.SILENCE_SECONDS", 3.0)
    p, x = increment(2, f32(4)), put(doomed, torch.zeros(4))
    os.kill(pids(doomed)[1], signal.SIGSTOP)
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"device 1 .*no sign of life"):
        if at == "run":
            doomed.run(p, [x], [])
            doomed.synchronize()
        else:
            put(doomed, torch.zeros(16 << 20))
    assert time.monotonic() - start < 8
    assert gone(pids(doomed), within=5)


def test_a_worker_that_cannot_start_is_an_error_with_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    expected = r"the worker of device [01] \(cpu:[01]\) exited with status 1 while starting"
    with pytest.raises(RuntimeError, match=expected):
        Accelerator(cpus(2))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_device_that_does_not_exist_is_an_error_at_the_start() -> None:
    with pytest.raises(RuntimeError, match=r"device 0 \(cuda:0\) cannot be used: "):
        Accelerator([Device("cuda", 0, 1 << 30, 1)])


# The script ends.

SCRIPT = """
    import sys, time, torch
    from moai.runtime.accelerator import Accelerator
    from tests.runtime.programs import busy_seconds, cpus, put
    a = Accelerator(cpus(2))
    a.run(busy_seconds(2), [put(a, torch.zeros(4000, 4000))], [])
    time.sleep(0.5)
    print(*[link.worker.pid for link in a._links], flush=True)
"""


@pytest.fixture
def script() -> Iterator:
    """Starts SCRIPT, whose workers are inside an operator of several seconds, with an end of its own."""
    started: list[subprocess.Popen] = []

    def start(end: str) -> tuple[subprocess.Popen, list[int]]:
        source = textwrap.dedent(SCRIPT) + textwrap.dedent(end)
        it = subprocess.Popen(
            [sys.executable, "-c", source],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        started.append(it)
        assert it.stdout is not None
        return it, [int(pid) for pid in it.stdout.readline().split()]

    yield start
    for each in started:
        each.kill()
        each.communicate()


@pytest.mark.parametrize(
    "end",
    ["", "raise ValueError", "import os, signal; os.kill(os.getpid(), signal.SIGTERM)"],
    ids=["normally", "by an exception", "by SIGTERM"],
)
def test_workers_end_with_the_script(script, end: str) -> None:
    process, workers = script(end)
    process.wait(30)
    assert len(workers) == 2 and gone(workers, within=5)


def test_a_worker_that_is_stopped_ends_with_the_script_too(script) -> None:
    process, workers = script("import os, signal; os.kill(a._links[0].worker.pid, signal.SIGSTOP)")
    process.wait(30)
    assert gone(workers, within=5)


def test_workers_end_when_the_script_is_killed(script) -> None:
    process, workers = script("time.sleep(60)")
    assert all(map(_alive, workers))
    process.kill()
    process.wait(5)
    assert gone(workers, within=5)


def test_workers_end_when_a_script_with_forked_children_is_killed(script) -> None:
    """A data loader's processes inherit the connections, and must not keep them open."""
    process, workers = script("import os; child = os.fork(); print(child, flush=True) if child else 0; time.sleep(30)")
    child = int(process.stdout.readline())
    process.kill()
    process.wait(5)
    try:
        assert gone(workers, within=5)
        assert _alive(child)
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_forked_child_that_ends_does_not_end_the_workers(script) -> None:
    process, workers = script(
        """
        import os
        if os.fork() == 0:
            sys.exit()
        os.wait()
        a.memory()
        print("fine", flush=True)
        """
    )
    assert process.stdout.readline() == "fine\n"
    assert gone(workers, within=5)


def test_after_ctrl_c_a_script_can_still_read(script) -> None:
    """The terminal sends SIGINT to the whole process group; a script may want to save its work."""
    process, workers = script(
        """
        x = put(a, torch.arange(3))
        try:
            print("busy", flush=True)
            a.synchronize()
        except KeyboardInterrupt:
            print(a.read(x).tolist(), flush=True)
            raise
        """
    )
    assert process.stdout.readline() == "busy\n"
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert out == "[0, 1, 2]\n" and "KeyboardInterrupt" in err
    assert gone(workers, within=5)


def test_the_secret_is_in_no_command_line(doomed: Accelerator) -> None:
    for pid in pids(doomed):
        assert psutil.Process(pid).cmdline()[1:] == ["-m", "moai.runtime.worker"]
