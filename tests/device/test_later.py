"""A number that is asked for early is the number, whoever looks at it."""

from __future__ import annotations

import math

import pytest
import torch

from moai.device import alias, later
from moai.device.later import Later

alias.turn_on()


def a(number: float) -> Later:
    return Later(lambda: number)


def test_it_is_asked_for_once_and_when_somebody_looks() -> None:
    asked = []
    number = Later(lambda: asked.append(1) or 2.5)
    assert not asked
    assert float(number) == number.value() == 2.5 and asked == [1]


@pytest.mark.parametrize(
    "look",
    [
        *(lambda x: x + 1, lambda x: 1 + x, lambda x: x - 1, lambda x: 1 - x, lambda x: x * 2, lambda x: 3 * x),
        *(lambda x: x / 2, lambda x: 2 / x, lambda x: x // 2, lambda x: x % 2, lambda x: x**2, lambda x: 2**x),
        *(lambda x: -x, abs, round, lambda x: round(x, 1), int, float, bool, str, repr, hash, math.sqrt),
        *(lambda x: x == 2.75, lambda x: x != 3, lambda x: x < 3, lambda x: x >= 3, lambda x: x > x, lambda x: x >= 2),
        *(
            lambda x: f"{x:.1f}",
            lambda x: str.format("{:.1f}", x),
            lambda x: sum([x, x]) / 2,
            lambda x: max(x, 1),
            lambda x: [x] * 2,
        ),
        lambda x: torch.ones(2, device="cpu") * x,
    ],
)
def test_whatever_is_done_with_it_gives_what_the_float_gives(look) -> None:
    found, expected = look(a(2.75)), look(2.75)
    assert str(found) == str(expected)


def test_what_is_computed_of_it_waits_too_while_numbers_do() -> None:
    asked = []
    with later.numbers_later(__name__):
        quotient = Later(lambda: asked.append(1) or 3.0) / 2
    assert not asked
    assert quotient + a(0.5) == 2.0


def test_item_gives_one_to_the_module_that_is_named_and_to_no_other() -> None:
    x = torch.ones(1, device="cuda")
    with later.numbers_later(__name__):
        assert type(x.item()) is Later
        assert type(torch.ones(1, device="cpu").item()) is float
        assert type(torch.ones(1, device="cuda", dtype=torch.int64).item()) is int
        assert type(eval("x.item()", {"x": x, "__name__": "other"})) is float
    assert type(x.item()) is float


def test_it_holds_what_the_tensor_held() -> None:
    x = torch.ones(1, device="cuda")
    with later.numbers_later(__name__):
        number = x.item()
    x.add_(1)
    assert number == 1.0
