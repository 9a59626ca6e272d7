"""Where a forward is cut, in which order stages work, and what is wrong with messages."""

from __future__ import annotations

import pytest
import torch

from moai.lower.stages.cut import balanced, following, layers_of
from moai.lower.stages.exchange_check import Event, misfit
from moai.lower.stages.schedule import BACKWARD, FORWARD, order
from moai.plan.plan import Schedule

ALIKE = [1.0] * 8
EVERYWHERE = [1] * 8


# -- cuts


def test_stages_take_equally_long() -> None:
    assert balanced(ALIKE, EVERYWHERE, 4) == [2, 4, 6]
    assert balanced([5.0, *ALIKE], [1, *EVERYWHERE], 2) == [2]


def test_a_cut_is_where_little_crosses_if_that_costs_little_time() -> None:
    assert balanced([1.0] * 12, [9, 1] * 6, 2) in ([5], [7])
    only_cheap_at_the_end = [9, 9, 9, 9, 9, 9, 9, 1]
    assert balanced(ALIKE, only_cheap_at_the_end, 2) == [4]


def test_what_takes_no_time_is_no_stage() -> None:
    assert balanced([1.0, 0.0, 0.0, 1.0], [1, 3, 1, 2], 2) == [2]
    assert balanced([1.0, 0.0, 0.0, 1.0], [1, 1, 1, 1], 3) is None


def test_cuts_follow_states_that_live_on_stages_already() -> None:
    reads = [[(0, 100)], [(0, 10)], [(0, 10)], [], [(1, 10)], [(1, 10)], []]
    assert following(reads, [9, 9, 9, 9, 1, 9, 9], 2) == [4]
    out_of_place = [[(0, 10)], [(1, 5)], [(0, 10)], [(1, 10)]]
    assert following(out_of_place, [1] * 4, 2) == [3]


MODEL = ["embed", *("norm", "mm", "gelu", "mm", "add") * 4, "norm", "mm"]


def test_layers_are_what_repeats_and_begin_where_least_crosses() -> None:
    found = layers_of(MODEL, [0, *(2, 3, 4, 4, 3) * 4, 2, 2])
    assert found is not None and (found.count, found.begins) == (4, (6, 11, 16))
    assert found.cuts([1, 2, 1]) == [6, 16]
    assert layers_of(["conv", "relu", "pool", "mm", "loss"], [1] * 5) is None


def test_layers_of_two_kinds_are_counted_together() -> None:
    found = layers_of([*("a", "b", "c") * 4, *("d", "e", "f", "g") * 4], [1] * 28)
    assert found is not None and (found.count, found.begins) == (8, None)


def test_layers_are_dealt_so_that_the_slowest_stage_is_as_fast_as_can_be() -> None:
    found = layers_of(MODEL, [0, *(2, 3, 4, 4, 3) * 4, 2, 2])
    assert found is not None
    assert found.even([0.0, *[1.0] * 20, 1.0, 1.0], 2) == [2, 2]
    assert found.even([0.0, *[1.0] * 20, 5.0, 5.0], 2) == [3, 1]
    assert found.even([1.0] * 23, 5) is None


# -- schedules


def in_flight(schedule: Schedule, stage: int, stages: int, passes: int) -> int:
    now, most = 0, 0
    for part, _ in order(schedule, stage, stages, passes):
        now += 1 if part == FORWARD else -1
        most = max(most, now)
    return most


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("stages", "passes"), [(2, 1), (2, 8), (4, 8), (4, 3), (8, 8)])
def test_every_part_is_run_once_and_in_the_order_of_the_passes(schedule: Schedule, stages: int, passes: int) -> None:
    for stage in range(stages):
        found = order(schedule, stage, stages, passes)
        for wanted in (FORWARD, BACKWARD):
            assert [step for part, step in found if part == wanted] == list(range(passes))


def test_1f1b_holds_no_more_micro_batches_than_there_are_stages_ahead() -> None:
    assert [in_flight("1f1b", stage, 4, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert [in_flight("gpipe", stage, 4, 16) for stage in range(4)] == [16] * 4


# -- messages

X = (((4, 2), torch.float32),)
Y = (((4, 3), torch.float32),)


def test_messages_that_fit_are_fine() -> None:
    assert (
        misfit([[Event("send", 1, X), Event("receive", 1, Y)], [Event("receive", 0, X), Event("send", 0, Y)]]) is None
    )


def test_stages_that_wait_for_each_other_are_found() -> None:
    waiting = [[Event("receive", 1, Y), Event("send", 1, X)], [Event("receive", 0, X), Event("send", 0, Y)]]
    assert "waits forever" in (misfit(waiting) or "")


def test_another_message_than_is_expected_is_found() -> None:
    crossed = [[Event("send", 1, X), Event("send", 1, Y)], [Event("receive", 0, Y), Event("receive", 0, X)]]
    assert "expects" in (misfit(crossed) or "")


def test_a_message_that_nobody_receives_is_found() -> None:
    assert "does not receive" in (misfit([[Event("send", 1, X)], []]) or "")
