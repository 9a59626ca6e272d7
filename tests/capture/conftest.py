"""The accelerator of these tests is the real one down to its session; only what runs the segments is exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch

from moai import session
from moai.capture import recorder as recorder_module
from moai.capture.held import HeldValues
from moai.capture.recorder import Recorder
from moai.capture.segment import OpenSegment
from moai.capture.trace import Call
from moai.device import alias
from moai.graph.step_graph import StepGraph
from tests.capture.inline import InlineExecutor

alias.turn_on()


@dataclass(frozen=True)
class Observed:
    """What one test sees of capture: the recorder, and the graphs that were new in this test with their causes."""

    recorder: Recorder
    executor: InlineExecutor

    @property
    def graphs(self) -> list[StepGraph]:
        return [graph for graph, _ in self.executor.graphs]

    @property
    def causes(self) -> list[str]:
        return [cause for _, cause in self.executor.graphs]

    @property
    def segments(self) -> int:
        return self.recorder.stats.segments


@pytest.fixture
def reads_on_the_host() -> bool:
    """Whether small values are worked out on the host instead of ending the segment. Off, so that small tests see what
    large programs do; a test that wants it on parametrizes this."""
    return False


on_the_host = pytest.mark.parametrize("reads_on_the_host", [True])
on_the_host_or_not = pytest.mark.parametrize("reads_on_the_host", [True, False], ids=["host", "graph"])


@pytest.fixture(autouse=True)
def capture(monkeypatch: pytest.MonkeyPatch, reads_on_the_host: bool) -> Iterator[Observed]:
    """A recorder that has seen nothing, whose segments run in this process."""
    torch.cuda.init()
    recorder, executor = session.current().recorder, InlineExecutor()
    monkeypatch.setattr(recorder, "execute", executor.execute)
    monkeypatch.setattr(recorder, "fetch", executor.fetch)
    monkeypatch.setattr(recorder, "on_new_graph", executor.new_graph)
    monkeypatch.setattr(recorder, "forget", executor.forget)
    if not reads_on_the_host:
        monkeypatch.setattr(recorder_module, "HOST_EVAL_OPERATORS", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    _forget_all(recorder)
    yield Observed(recorder, executor)
    _forget_all(recorder)
    torch.set_num_threads(threads)


def _forget_all(recorder: Recorder) -> None:
    recorder.in_optimizer = False
    recorder.root = Call(None, None)
    recorder.held_values = HeldValues()
    recorder.segment = OpenSegment(recorder.root, recorder.segment.epoch + 1)
