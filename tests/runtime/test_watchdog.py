"""The watchdog tells slow from stuck. Time is given, so that these tests need none."""

from moai.platform.device import Device
from moai.runtime.messages import Pulse
from moai.runtime.watchdog import SILENCE_SECONDS, STALL_SECONDS, Watchdog
from tests.runtime.programs import cpus

STALL = int(STALL_SECONDS["cpu"])
BOTH = (True, True)


def pulse(executed: int = 0, cpu: float = 0.0, doing: str = "aten.mm.default", collective: bool = False) -> Pulse:
    return Pulse(executed, cpu, doing, collective, 0, 0, 1.0)


def watch(seconds: int, *pulses_at, at_work=BOTH, devices=None):
    """The first verdict of so many seconds, and when; `pulses_at[r](t)` is device r's pulse at t, None for silence."""
    dog = Watchdog(devices or cpus(len(pulses_at)), 0.0)
    for t in range(1, seconds + 1):
        for rank, pulse_at in enumerate(pulses_at):
            if (p := pulse_at(t)) is not None:
                dog.heard(rank, t)
                dog.pulse(rank, p, t)
        if verdict := dog.verdict(at_work, t):
            return verdict, t
    return None, seconds


def test_executing_is_progress() -> None:
    assert watch(100, lambda t: pulse(executed=t), lambda t: pulse(executed=t))[0] is None


def test_computing_is_progress() -> None:
    """One operator may take minutes."""
    assert watch(100, lambda t: pulse(cpu=t), lambda t: pulse(cpu=0.5 * t))[0] is None


def test_waiting_for_a_device_that_computes_is_no_stall() -> None:
    assert watch(100, lambda t: pulse(cpu=t), lambda t: pulse(doing="all_reduce", collective=True))[0] is None


def test_a_device_without_work_is_no_stall() -> None:
    assert watch(100, lambda t: pulse(cpu=t), lambda t: pulse(doing=""), at_work=(True, False))[0] is None


def test_a_silent_worker_is_stuck() -> None:
    verdict, t = watch(100, lambda t: pulse(cpu=t), lambda t: pulse(cpu=t) if t < 10 else None)
    assert verdict and verdict.rank == 1 and "no sign of life" in verdict.text and "aten.mm" in verdict.text
    assert t <= 10 + SILENCE_SECONDS < 30


def test_neither_progress_nor_cpu_time_outside_of_a_collective_is_stuck() -> None:
    verdict, t = watch(100, lambda t: pulse(doing="all_reduce", collective=True), lambda t: pulse())
    assert verdict and verdict.rank == 1 and "no progress" in verdict.text
    assert t <= STALL + 2 < 30


def test_all_waiting_for_each_other_are_stuck() -> None:
    waits = lambda t: pulse(doing="all_gather", collective=True)  # noqa: E731
    verdict, t = watch(100, waits, waits)
    assert verdict and "wait for each other" in verdict.text and verdict.text.count("all_gather") == 2
    assert t <= STALL + 2 < 30


def test_a_kernel_on_a_gpu_may_run_long() -> None:
    gpu = [Device("cuda", 0, 1 << 30, 1)]
    assert watch(200, lambda t: pulse(), at_work=(True,), devices=gpu)[0] is None
    assert watch(400, lambda t: pulse(), at_work=(True,), devices=gpu)[0] is not None


def test_time_without_work_does_not_count() -> None:
    dog = Watchdog(cpus(1), 0.0)
    for t in range(100):
        assert dog.verdict([False], t) is None
    assert dog.verdict([True], 100) is None


def test_a_pause_of_the_controller_itself_blames_nobody() -> None:
    """Ctrl-Z, a debugger, a machine that was asleep."""
    dog = Watchdog(cpus(1), 0.0)
    assert dog.verdict([True], 1.0) is None
    assert dog.verdict([True], 1000.0) is None
    assert dog.verdict([True], 1001.0) is None
