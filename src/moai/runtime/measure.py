"""The memory that a run takes, counted by PyTorch's allocator: for tests and benchmarks, on CPU devices.

In: the environment variable MOAI_MEMORY_LOG, the beginning of a path. Out: a file for each worker, its process id at
the end of its name, with a line of JSON for each run of a program: its name, and the predicted and the counted peak.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from moai.runtime.executor import Executor

VARIABLE = "MOAI_MEMORY_LOG"
_LETTING_GO_SECONDS = 0.01


def run(executor: Executor, inputs: list[torch.Tensor], scalars: Sequence[float | int]) -> list[torch.Tensor]:
    """`executor.run`, and a line for it if the variable is set."""
    path = os.environ.get(VARIABLE)
    if not path:
        return executor.run(inputs, scalars)
    given = list(inputs)  # outlives the count, which may or may not see the end of what was there before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        for i in range(len(inputs)):
            inputs[i] = inputs[i].clone()
        with _backend_lets_go():
            outputs = executor.run(inputs, scalars)
    given.clear()
    program = executor.program
    line = {"program": program.name, "predicted": program.peak_bytes, "counted": _peak(profiled)}
    with open(f"{path}.{os.getpid()}", "a") as file:
        file.write(json.dumps(line) + "\n")
    return outputs


@contextmanager
def _backend_lets_go() -> Iterator[None]:
    """The backend's thread forgets a message just after it has said that it is done with it. If it is the last to do
    so, the end of the message is not counted: events are those of this thread. So it is given the time."""
    wait = dist.Work.wait

    def patient(work: dist.Work, *args: Any) -> Any:
        done = wait(work, *args)
        time.sleep(_LETTING_GO_SECONDS)
        return done

    dist.Work.wait = patient  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        dist.Work.wait = wait  # type: ignore[method-assign]


def _peak(profiled: profile) -> int:
    """The most bytes that there were at any time."""
    recorded: Any = profiled.profiler
    events = [(e.start_ns(), e.nbytes()) for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        now += nbytes
        peak = max(peak, now)
    return peak
