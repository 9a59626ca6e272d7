"""What recording costs: `python -m benchmarks.capture`.

A deep and very narrow Qwen2 is trained through the real device, so that a step is almost only recording. Each run is a
fresh process. Figures, each with its quartiles over the runs (for steady steps: over all of them):

- `first_us_per_op`: host time of the first step, which describes every call, per operator call that reached the device.
- `replay_us_per_op`: the same of the steady steps, whose calls all follow the recorded ones.
- `first_cpu_us_per_op`, `replay_cpu_us_per_op`: the process's CPU time instead, which other programs disturb less.
- `flush_ms`: handing a steady step over: looking the graph up, planning, telling the workers; no computing.
- `host_share`: recording and flushing over the whole time of a steady step whose loss is read.
- `graphs_until_steady`: graphs that were built before those that the steady steps run; `steady_recorded`, calls that
  were described anew after that, is 0 when nothing is re-traced.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import results
from benchmarks.child import Child
from benchmarks.training import Corpus, Sizes

RUN_SECONDS = 240.0
# Graphs may still be learnt in the first steps: what is held at a step's end is known only after the next.
STEPS_LEAST = 8


@dataclass(frozen=True, slots=True)
class Step:
    """One step as its script saw it: seconds of recording (and CPU seconds), of flushing, of waiting for the loss;
    calls that reached the device, those of them that were described anew, and the graphs and segments of the step."""

    record_s: float
    record_cpu_s: float
    flush_s: float
    wait_s: float
    ops: int
    recorded: int
    graphs: int
    segments: int

    @property
    def us_per_op(self) -> float:
        """Host microseconds a call."""
        return self.record_s / self.ops * 1e6

    @property
    def cpu_us_per_op(self) -> float:
        """CPU microseconds a call, of all the process's threads: backward has one of its own."""
        return self.record_cpu_s / self.ops * 1e6

    @property
    def host_share(self) -> float:
        """The part of the step in which the host was at work."""
        return (self.record_s + self.flush_s) / (self.record_s + self.flush_s + self.wait_s)


def sizes(layers: int) -> Sizes:
    """A Qwen2 with many operators and almost nothing to compute."""
    return Sizes(layers=layers, hidden=32, intermediate=64, heads=4, kv_heads=2, vocab=128, seq=16, batch=4)


def train(connection: Connection, layers: int, steps: int) -> None:
    """The child's side: train, and send the steps."""
    torch.set_num_threads(1)
    corpus = Corpus(sizes(layers))
    model: nn.Module = sizes(layers).model()
    model.cuda()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)

    from moai import session  # only now, as in any script: the first use of "cuda" has made the session

    recorder = session.current().recorder
    for index in range(steps):
        tokens, labels = (x.cuda() for x in corpus.batch(index))
        mask = torch.ones(tokens.shape, dtype=torch.long).cuda()
        before = asdict(recorder.stats)
        t0, cpu0 = time.perf_counter(), time.process_time()
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        t1, cpu1 = time.perf_counter(), time.process_time()
        recorder.flush()
        t2 = time.perf_counter()
        loss.item()
        t3 = time.perf_counter()
        new = {name: value - before[name] for name, value in asdict(recorder.stats).items()}
        ops = new["replayed"] + new["recorded"] + new["views"]
        connection.send(
            Step(t1 - t0, cpu1 - cpu0, t2 - t1, t3 - t2, ops, new["recorded"], new["graphs"], new["segments"])
        )


def run(layers: int, steps: int, devices: int) -> list[Step]:
    """The steps of one fresh process."""
    with tempfile.TemporaryDirectory() as state:
        environment = {**os.environ, "MOAI_DEVICES": str(devices), "XDG_STATE_HOME": state}
        environment.pop("MOAI_FLAVOR", None)
        child = Child("capture", "benchmarks.capture:train", {"layers": layers, "steps": steps}, environment)
        try:
            return [child.receive(RUN_SECONDS) for _ in range(steps)]
        finally:
            child.close()


def summarize(runs: Sequence[Sequence[Step]]) -> dict[str, Any]:
    """The figures of the module docstring."""
    steady_from = [max(i for i, s in enumerate(steps) if s.graphs or i == 0) + 1 for steps in runs]
    steady = [step for steps, first in zip(runs, steady_from, strict=True) for step in steps[first:]]
    if not steady:
        raise RuntimeError("No run became steady: every step up to the last built a new graph. Try more --steps.")
    until_steady = max(sum(s.graphs for s in steps) - steps[-1].segments for steps in runs)
    return {
        "first_us_per_op": results.quartiles(steps[0].us_per_op for steps in runs),
        "replay_us_per_op": results.quartiles(s.us_per_op for s in steady),
        "first_cpu_us_per_op": results.quartiles(steps[0].cpu_us_per_op for steps in runs),
        "replay_cpu_us_per_op": results.quartiles(s.cpu_us_per_op for s in steady),
        "ops_per_step": steady[-1].ops,
        "host_share": results.quartiles(s.host_share for s in steady),
        "flush_ms": results.quartiles(s.flush_s * 1e3 for s in steady),
        "step_ms": results.quartiles((s.record_s + s.flush_s + s.wait_s) * 1e3 for s in steady),
        "graphs_until_steady": until_steady,
        "steady_from_step": max(steady_from),
        "steady_recorded": sum(s.recorded for s in steady),
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as Markdown."""
    rows = [("first recording, us/op", "first_us_per_op", 1), ("the same, of CPU", "first_cpu_us_per_op", 1)]
    rows += [("replay, us/op", "replay_us_per_op", 1), ("the same, of CPU", "replay_cpu_us_per_op", 1)]
    rows += [("flush, ms", "flush_ms", 2), ("step, ms", "step_ms", 1), ("host's share of a step", "host_share", 2)]
    lines = ["| | median (q25-q75) |", "|---|---|"]
    lines += [f"| {label} | {results.spread(figures[key], digits=digits)} |" for label, key, digits in rows]
    lines.append(f"| operators a step | {figures['ops_per_step']} |")
    lines.append(f"| graphs before the steady one | {figures['graphs_until_steady']} |")
    lines.append(f"| calls described anew in steady steps | {figures['steady_recorded']} |")
    lines.append(f"| machine's time taken by others | {figures['others_cpu']:.0%} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.capture", description="What recording a training step costs the host."
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--steps", type=int, default=20, help=f"steps a run, {STEPS_LEAST} or more")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--devices", type=int, default=1)
    options = parser.parse_args(arguments)
    if options.steps < STEPS_LEAST or min(options.runs, options.layers, options.devices) < 1:
        parser.error(f"--steps must be {STEPS_LEAST} or more, --runs, --layers and --devices 1 or more")
    machine = results.provenance()
    neighbours = results.Neighbours()
    runs = [run(options.layers, options.steps, options.devices) for _ in range(options.runs)]
    settings = {k: v for k, v in vars(options).items() if k not in ("json", "record")}
    figures = summarize(runs) | {"others_cpu": neighbours.share(), "settings": settings, "run": machine}
    said = ", ".join(f"{v} {k}" for k, v in settings.items())
    print(f"capture ({said})\n\n{table(figures)}")
    if options.json:
        results.write_json(options.json, figures)
    if options.record:
        results.record(f"Capture ({said})", table(figures), machine)


if __name__ == "__main__":
    main()
