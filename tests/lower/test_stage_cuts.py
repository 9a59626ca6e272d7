"""Where a forward is cut, and what is wrong with messages."""

from __future__ import annotations

import torch

from moai.lower.stages.cut import balanced, layers_of
from moai.lower.stages.exchange_check import Event, misfit
from moai.lower.stages.following import following

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
    assert following(reads, [9, 9, 9, 9, 1, 9, 9], 2, 2) == [4]
    out_of_place = [[(0, 10)], [(1, 5)], [(0, 10)], [(1, 10)]]
    assert following(out_of_place, [1] * 4, 2, 2) == [3]


def test_states_say_in_how_many_stages_a_device_reads_them() -> None:
    reads = [[(device, 10)] for device in (0, 0, 1, 0, 0, 1, 1)]
    assert following(reads, [1] * 7, 4, 2) == [2, 3, 5]
    assert following(reads, [1] * 7, 2, 2) == [5]


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


# -- messages

X = (((4, 2), torch.float32),)
Y = (((4, 3), torch.float32),)


def test_messages_that_fit_are_fine() -> None:
    assert misfit([[Event(1, X), Event(1, Y, 0)], [Event(0, X, 0), Event(0, Y)]]) is None


def test_messages_may_be_needed_in_another_order_than_they_are_sent_in() -> None:
    assert misfit([[Event(1, X), Event(1, Y)], [Event(0, Y, 1), Event(0, X, 0)]]) is None


def test_stages_that_wait_for_each_other_are_found() -> None:
    waiting = [[Event(1, Y, 0), Event(1, X)], [Event(0, X, 0), Event(0, Y)]]
    assert "waits forever" in (misfit(waiting) or "")


def test_another_message_than_is_expected_is_found() -> None:
    crossed = [[Event(1, X), Event(1, Y)], [Event(0, Y, 0), Event(0, X, 1)]]
    assert "expects" in (misfit(crossed) or "")


def test_a_message_that_is_received_twice_is_found() -> None:
    assert "twice" in (misfit([[Event(1, X), Event(1, X)], [Event(0, X, 0), Event(0, X, 0)]]) or "")


def test_a_message_that_nobody_receives_is_found() -> None:
    assert "does not receive" in (misfit([[Event(1, X)], []]) or "")
