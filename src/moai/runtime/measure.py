"""The memory that a run takes, counted by PyTorch's allocator: for tests and benchmarks, on CPU devices.

In: the environment variable MOAI_MEMORY_LOG, the beginning of a path. Out: a file for each worker, its process id at
the end of its name, with a line of JSON for each run of a program: its name, and the predicted and the counted peak.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from moai.runtime.executor import Executor

VARIABLE = "MOAI_MEMORY_LOG"


def run(executor: Executor, inputs: list[torch.Tensor], scalars: Sequence[float | int]) -> list[torch.Tensor]:
    """`executor.run`, and a line for it if the variable is set."""
    path = os.environ.get(VARIABLE)
    if not path:
        return executor.run(inputs, scalars)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiled:
        # The allocator's events do not tell of the end of what was there before: it is made anew.
        for i in range(len(inputs)):
            inputs[i] = inputs[i].clone()
        outputs = executor.run(inputs, scalars)
    program = executor.program
    line = {"program": program.name, "predicted": program.peak_bytes, "counted": _peak(profiled)}
    with open(f"{path}.{os.getpid()}", "a") as file:
        file.write(json.dumps(line) + "\n")
    return outputs


def _peak(profiled: profile) -> int:
    """The most bytes that there were at any time."""
    recorded: Any = profiled.profiler
    events = [(e.start_ns(), e.nbytes()) for e in recorded.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for _, nbytes in sorted(events, key=lambda event: event[0]):
        now += nbytes
        peak = max(peak, now)
    return peak
