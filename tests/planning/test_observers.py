"""Two processes observe plans: the second does what will probably be asked for next."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from moai.plan.errors import PlanError
from moai.plan.plan import Plan
from moai.planning.observers import two_observers

FIRST, SECOND, THIRD = Plan(dp=2), Plan(dp=4), Plan(dp=8)
IMPOSSIBLE = Plan(dp=3)


@pytest.fixture(autouse=True)
def without_others(monkeypatch):
    """Threads that other tests have left do nothing here."""
    left = threading.active_count() - 1
    count = threading.active_count
    monkeypatch.setattr("moai.planning.observers.threading.active_count", lambda: count() - left)


def who(plan):
    """Says which process was asked."""
    if plan == IMPOSSIBLE:
        raise PlanError("three is too many", Plan(dp=2))
    return plan, os.getpid()


def test_what_is_expected_is_observed_by_another_process():
    with two_observers(who) as (observe, expect):
        expect(FIRST, SECOND)
        assert observe(FIRST) == (FIRST, os.getpid())
        plan, process = observe(SECOND)
    assert plan == SECOND and process != os.getpid()


def test_what_was_expected_in_vain_does_not_get_in_the_way():
    with two_observers(who) as (observe, expect):
        expect(FIRST, SECOND)
        expect(FIRST, THIRD)
        assert observe(THIRD)[0] == THIRD
        assert observe(FIRST)[0] == FIRST
        assert observe(SECOND)[0] == SECOND


def test_a_plan_that_the_other_process_is_at_makes_it_expect_no_other():
    with two_observers(who) as (observe, expect):
        expect(FIRST, SECOND)
        expect(SECOND, THIRD)
        assert observe(SECOND)[1] != os.getpid()
        assert observe(THIRD)[1] == os.getpid()


def test_an_error_of_the_other_process_is_that_of_the_plan():
    with two_observers(who) as (observe, expect):
        expect(FIRST, IMPOSSIBLE)
        with pytest.raises(PlanError, match="three is too many") as caught:
            observe(IMPOSSIBLE)
    assert caught.value.nearest == Plan(dp=2) and caught.value.reason == "three is too many"


def test_without_the_other_process_the_first_observes_alone():
    with two_observers(who) as (observe, expect):
        expect(FIRST, SECOND)
        other = observe(SECOND)[1]
        os.kill(other, signal.SIGKILL)
        expect(SECOND, THIRD)
        assert observe(THIRD) == (THIRD, os.getpid())


def test_a_process_with_threads_observes_alone():
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    try:
        with two_observers(who) as (observe, expect):
            expect(FIRST, SECOND)
            assert observe(SECOND) == (SECOND, os.getpid())
    finally:
        done.set()
        thread.join()


def test_no_process_is_left():
    with two_observers(who) as (observe, expect):
        expect(FIRST, SECOND)
        observe(SECOND)
        assert multiprocessing.active_children()
    assert not multiprocessing.active_children()


def test_the_other_process_does_not_outlive_the_first():
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    process = context.Process(target=_die_with_another, args=(theirs,))
    process.start()
    other = mine.recv()
    process.join(10)
    until = time.monotonic() + 10
    while _is_alive(other) and time.monotonic() < until:
        time.sleep(0.01)
    assert not _is_alive(other)


def _die_with_another(connection):
    with two_observers(who) as (observe, expect):
        expect(FIRST, SECOND)
        connection.send(observe(SECOND)[1])
        os.kill(os.getpid(), signal.SIGKILL)


def _is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
