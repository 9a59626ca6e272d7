"""A job's mean tokens per second counts finished steps only, and not the first."""

from __future__ import annotations

from collections.abc import Iterator

from moai.platform.speed import Speedometer


def speed_after(times: list[float], tokens: int) -> float | None:
    clock: Iterator[float] = iter(times)
    meter = Speedometer(lambda: next(clock))
    for _ in times:
        meter.step(tokens)
    return meter.tokens_per_s


def test_the_first_step_and_the_last_do_not_count() -> None:
    assert speed_after([0.0, 60.0, 62.0, 64.0], tokens=100) == 2 * 100 / 4.0


def test_two_steps_tell_no_speed() -> None:
    assert speed_after([0.0, 60.0], tokens=100) is None


def test_steps_without_tokens_have_no_speed() -> None:
    assert speed_after([0.0, 1.0, 2.0, 3.0], tokens=0) is None
