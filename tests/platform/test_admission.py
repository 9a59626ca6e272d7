"""When a program may start: alone on its accelerator, within the pool, in its turn."""

import signal

import pytest

from moai.platform import accelerators, admission, flavors, processes, state
from moai.platform.errors import AcceleratorError, StateError
from moai.platform.pool import GB, Machine

LAPTOP = Machine(cores=2, memory_bytes=23 * GB)  # a pool of four CPU workers
SMALL, MEDIUM, LARGE = flavors.available(LAPTOP)
NOT_YET = 0.6  # seconds within which a program that may start has started


def requests(environ):
    with state.transaction(environ) as db:
        return db.execute("SELECT pid FROM requests ORDER BY id").fetchall()


def test_a_program_gets_its_devices_at_once(start):
    assert start().lease() == (1, [0, 1])


def test_two_accelerators_run_two_programs_on_different_devices(environ, start):
    accelerators.add(MEDIUM, environ)
    assert start().lease()[1] == [0, 1]
    assert start(MOREH_VISIBLE_DEVICE="1").lease()[1] == [2, 3]


def test_devices_that_were_released_are_given_again(environ, start):
    first = start(MOAI_DEVICES="1")
    assert first.lease()[1] == [0]
    assert start(MOAI_DEVICES="1").lease()[1] == [1]
    first.end()
    assert start(MOAI_DEVICES="2").lease()[1] == [0, 2]


# A busy accelerator


def test_a_second_program_says_whom_it_waits_for_and_resumes_by_itself(start):
    first = start()
    first.lease()
    second = start().waits()
    assert second.lease(NOT_YET) is None
    said = second.said("MOREH_VISIBLE_DEVICE")
    assert "[warning] MoAI Accelerator is already in use by another process:\n" in said
    assert f"[warning]   (pid: {first.pid}) " in said
    assert (
        "[warning] Two or more processes cannot use MoAI Accelerator at the same time. The program will resume"
        f" automatically after the process {first.pid} terminates...\n" in said
    )
    assert "moreh-smi --reset" in said
    first.end()
    assert second.lease() == (2, [0, 1])


def test_a_waiting_program_prints_a_dot_a_second(start):
    start().lease()
    start().waits().said("MOREH_VISIBLE_DEVICE.\n..")


def test_a_killed_program_holds_up_nobody(start):
    first = start()
    first.lease()
    second = start().waits()
    first.kill()
    assert second.lease(2.0) is not None


def test_a_program_with_an_accelerator_of_its_own_waits_for_no_other(start):
    start().lease()
    assert start(MOAI_FLAVOR="Small").lease() == (2, [2])


def test_a_program_that_gives_up_leaves_nothing(environ, start):
    start().lease()
    second = start().waits()
    assert len(requests(environ)) == 1
    second.signal(signal.SIGINT)
    second.end()
    with state.transaction(environ) as db:
        assert db.execute("SELECT pid FROM requests").fetchall() == []


def test_a_killed_waiting_program_leaves_nothing_to_who_looks(environ, start):
    first = start()
    first.lease()
    second, third = start().waits(), start().waits()
    second.kill()
    first.end()
    assert third.lease() is not None
    assert requests(environ) == []


def test_an_accelerator_that_is_removed_under_a_waiting_program_is_said(environ, start):
    accelerators.add(SMALL, environ)
    start(MOAI_DEVICES="4").lease()
    waiting = start(MOREH_VISIBLE_DEVICE="1").waits()
    accelerators.remove(1, environ)
    waiting.said("Accelerator 1 has been removed")


# A full pool


def test_a_program_that_does_not_fit_in_the_pool_says_so_and_resumes_by_itself(start):
    first, second = start(MOAI_DEVICES="2"), start(MOAI_DEVICES="2")
    assert sorted(first.lease()[1] + second.lease()[1]) == [0, 1, 2, 3]
    third = start(MOAI_DEVICES="2").waits()
    assert (
        "[warning] Not enough resources are currently available for MoAI Accelerator. All resources in the system are"
        " being used by other users. The program will resume automatically when resources become available..."
        in third.said("become available")
    )
    assert third.lease(NOT_YET) is None
    first.end()
    assert third.lease() is not None


def queue(start, *programs):
    """Programs that wait for a full pool, in the order in which they came; and who holds it."""
    holder = start(MOAI_DEVICES="4")
    holder.lease()
    return holder, [start(MOAI_DEVICES="4", MOAI_PRIORITY=str(priority)).waits() for priority in programs]


def served(waiting):
    """The order in which they get the pool."""
    order = []
    while len(order) < len(waiting):
        for i, program in enumerate(waiting):
            if i not in order and program.lease(0.05) is not None:
                order.append(i)
                program.end()
    return order


def test_who_came_first_is_served_first(start):
    holder, waiting = queue(start, 0, 0, 0)
    holder.end()
    assert served(waiting) == [0, 1, 2]


def test_a_higher_priority_is_served_first(start):
    holder, waiting = queue(start, -99, 0, 99)
    holder.end()
    assert served(waiting) == [2, 1, 0]


def test_a_small_program_does_not_overtake_a_large_one(start):
    start(MOAI_DEVICES="2").lease()
    large = start(MOAI_DEVICES="4").waits()
    small = start(MOAI_DEVICES="1").waits()
    assert small.lease(NOT_YET) is None
    large.signal(signal.SIGINT)
    large.end()
    assert small.lease() is not None


def test_who_waits_for_a_busy_accelerator_holds_up_nobody_else(start):
    start().lease()
    start().waits()
    assert start(MOAI_DEVICES="2").lease() is not None


def test_a_stopped_program_holds_up_nobody(start):
    start(MOAI_DEVICES="2").lease()
    large = start(MOAI_DEVICES="4").waits()
    small = start(MOAI_DEVICES="1").waits()
    large.signal(signal.SIGSTOP)
    assert small.lease() is not None
    large.signal(signal.SIGCONT)


def test_a_job_larger_than_the_pool_has_it_to_itself(start):
    large = start(MOAI_DEVICES="6")
    assert large.lease()[1] == [0, 1, 2, 3, 4, 5]
    small = start(MOAI_DEVICES="1").waits()
    assert small.lease(NOT_YET) is None
    large.end()
    assert small.lease() is not None


@pytest.mark.parametrize("priority", ["100", "-100", "high", "1.5"])
def test_a_priority_is_a_number_from_minus_99_to_99(environ, priority):
    choice = accelerators.choose(environ, LAPTOP)
    with pytest.raises(AcceleratorError, match=f"MOAI_PRIORITY={priority}: a whole number from -99 to 99"):
        admission.acquire(choice, "", {**environ, "MOAI_PRIORITY": priority}, LAPTOP)


# GPUs


def test_gpus_are_told_apart_by_what_all_programs_call_them(environ):
    def machine(*uuids):
        return Machine(16, 64 * GB, (80 * GB,) * len(uuids), uuids)

    both = machine("GPU-a", "GPU-b")
    choice = accelerators.choose({**environ, "MOAI_DEVICES": "1"}, both)
    (first,) = admission.acquire(choice, "", environ, both).devices
    with state.transaction(environ) as db:  # as if another program held it
        db.execute("UPDATE jobs SET pid = 1, birth = ?", (processes.birth(1),))
    (second,) = admission.acquire(choice, "", environ, machine("GPU-b", "GPU-a")).devices
    assert (first.index, second.index) == (0, 0)  # of a and of b


def test_a_locked_database_is_said_in_one_line(environ, monkeypatch):
    monkeypatch.setattr(state, "BUSY_SECONDS", 0.1)
    choice = accelerators.choose(environ, LAPTOP)
    with state.transaction(environ), pytest.raises(StateError, match=r"has been locked by another program") as error:
        admission.acquire(choice, "", environ, LAPTOP)
    assert "\n" not in str(error.value)


def test_a_program_has_one_job(environ):
    """In a notebook, what was interrupted while it started must not keep the next start waiting."""
    choice = accelerators.choose(environ, LAPTOP)
    first = admission.acquire(choice, "", environ, LAPTOP)
    second = admission.acquire(choice, "", environ, LAPTOP)
    assert (second.job_id, second.devices) == (first.job_id + 1, first.devices)
