"""The memory of a device in the course of a step, as it is drawn."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from moai.lower import lower
from moai.lower.course import course
from moai.plan.parse import parse
from moai.plan.work import Work
from tests.capture.conftest import capture, on_the_host, reads_on_the_host  # noqa: F401 (fixtures)
from tests.lower.captured_steps import capturing, llama_with_adamw, sizes

POINTS = 60


def alike(work: Work) -> np.ndarray:
    """Every task takes a second."""
    return np.ones(len(work.kind))


@pytest.fixture
def graph(capture, monkeypatch):  # noqa: F811
    return capturing(capture, monkeypatch)(llama_with_adamw(8, 32, times=2, **sizes(4))).graph


@on_the_host
@pytest.mark.parametrize(
    "text", ["dp=2", "tp=2", "dp=2,micro=4", "dp=2,micro=2,recompute=full,distribute_param=true,precision=bf16"]
)
def test_its_highest_point_is_the_programs_peak(graph, text):
    plan = parse(text, 2)
    curve = course(graph, plan, alike, POINTS)
    assert len(curve) == POINTS and curve[0][0] == 0.0
    assert max(level for _, level in curve) == lower(graph, plan, [None] * len(graph.inputs)).peak_bytes


@on_the_host
def test_memory_rises_and_falls_with_every_micro_batch(graph):
    curve = [level for _, level in course(graph, parse("dp=2,micro=4", 2), alike, 400)]
    middle = (max(curve) + min(curve)) / 2
    assert sum(a < middle <= b for a, b in pairwise(curve)) >= 4
