"""A pipeline's step from what its stages do: bubbles, messages, memory and layers, by schedule."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from moai.plan.cost import predict
from moai.plan.plan import Plan
from moai.plan.prediction import Prediction
from moai.plan.timings import Group
from moai.plan.work import Held, Stages, StageWork, Work
from tests.plan.test_cost import Told, computes

PLACES = 3


def stage(layers: int, more: float = 0.0, waiting: float = 10.0) -> StageWork:
    """Each layer takes 1 s forward, 1 s for gradients of inputs and 1 s for those of weights; `more` s forward are
    beside them. It holds 100 bytes of parameters, as many of gradients and of states, and what is `waiting`, of which 4
    are for gradients of weights."""
    layer = [computes(1.0), computes(1.0, "backward"), computes(1.0, "backward", late=True)]
    work = Work.of([computes(more), *layer * layers])
    n = float(layers)
    kept = np.full(PLACES, waiting * n)
    held = Held(300.0 * n + kept, np.full(PLACES, 100.0 * n), kept, 100.0 * n, 100.0 * n, 0.0)
    return StageWork(work, held, kept, layers, late=4.0 * n)


def pipeline(layers: int, first: float = 0.0, last: float = 0.0, handed: float = 0.0) -> Stages:
    return Stages(stage(1, first), stage(1), stage(2), stage(1, last), layers, handed)


def step(stages: Stages, plan: Plan, timings: Any = None, **more: Any) -> Prediction:
    return predict(stages, plan, timings or Told(), {"pp": Group(2)}, **more)


@pytest.mark.parametrize(
    ("schedule", "chunks", "bubble"),
    [("1f1b", 1, 3.0), ("gpipe", 1, 3.0), ("zero_bubble", 1, 1.0), ("interleaved", 2, 1.5)],
)
@pytest.mark.parametrize("micro", [4, 8, 64])
def test_equal_stages_have_the_bubble_of_their_schedule(schedule: Any, chunks: int, bubble: float, micro: int) -> None:
    """Of S stages of a second forward, S - 1 times so much: F + B + W, F + B - W, or that over the chunks."""
    plan = Plan(pp=4, micro=micro, schedule=schedule, chunks=chunks)
    found = step(pipeline(16), plan)
    a_layer = 4  # seconds of a stage's forward: its layers
    assert found.parts.bubble == pytest.approx(3 * bubble * a_layer)
    assert found.step_s == pytest.approx(micro * 3.0 * a_layer + found.parts.bubble)


def test_the_slowest_stage_sets_the_pace() -> None:
    found = step(pipeline(4, last=3.0), Plan(pp=2, micro=20), dealt=[2, 2])
    assert found.step_s == pytest.approx(20 * 9.0 + 6.0)
    assert [each.layers for each in step(pipeline(5, last=3.0), Plan(pp=2, micro=20)).stages] == [3, 2]


def test_a_message_is_waited_for_where_nothing_else_is_to_be_done() -> None:
    class Slow(Told):
        def durations(self, work: Work, groups: Any) -> np.ndarray:
            return np.where(work.message > 0, 0.5, work.bytes)

    stages = pipeline(2, handed=1.0)
    all_first = step(stages, Plan(pp=2, micro=8, schedule="gpipe"), Slow())
    in_turns = step(stages, Plan(pp=2, micro=8), Slow())
    assert all_first.parts.pp_exposed == pytest.approx(2 * 0.5)  # once up and once down
    assert in_turns.parts.pp_exposed > all_first.parts.pp_exposed
    assert in_turns.step_s == pytest.approx(in_turns.parts.total)


@pytest.mark.parametrize(
    ("plan", "activations"),
    [
        (Plan(pp=4, micro=16), [40, 30, 20, 10]),
        (Plan(pp=4, micro=2), [20, 20, 20, 10]),
        (Plan(pp=4, micro=16, schedule="gpipe"), [160] * 4),
        (Plan(pp=4, micro=16, schedule="zero_bubble"), [40, 30 + 4, 20 + 8, 10 + 12]),
    ],
    ids=str,
)
def test_a_device_holds_what_its_schedule_has_under_way(plan: Plan, activations: list[int]) -> None:
    found = step(pipeline(8), plan)
    assert [each.memory.activations for each in found.stages] == [2 * each for each in activations]
    assert all(each.memory.total == 2 * 300.0 + each.memory.activations for each in found.stages)


def test_a_device_with_several_stages_holds_the_states_of_all() -> None:
    plain, chunked = (step(pipeline(8), replace(Plan(pp=2, micro=8), schedule=s)) for s in ("1f1b", "interleaved"))
    assert len(chunked.stages) == 4 and [each.layers for each in chunked.stages] == [2] * 4
    for part in ("parameters", "gradients", "states"):
        assert getattr(chunked.memory, part) == getattr(plain.memory, part) == 400.0
    assert chunked.memory.activations > plain.memory.activations


def test_a_deal_for_each_stage_of_a_device_is_asked_for() -> None:
    plan = Plan(pp=2, micro=4, schedule="interleaved")
    assert step(pipeline(8), plan, dealt=[3, 1, 3, 1]).step_s > step(pipeline(8), plan).step_s
    with pytest.raises(ValueError, match="does not deal 8 layers to 4 stages"):
        step(pipeline(8), plan, dealt=[4, 4])
