"""Does what the planner chooses fit? `python -m benchmarks.fits`

Random small models, batches and sizes of the devices' memory: the planner chooses a plan within its budget of that
memory, as it does for a program, and workers run the first step and a later one. What they hold at the most is counted
by PyTorch's allocator (`moai.runtime.measure`). A trial fails if that is more than the devices are said to have. One
where no plan fits the budget is refused: it is told, and does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import results
from benchmarks.steps import Recording, Script, Steps, made_up, recording
from moai.graph.step_graph import StepGraph
from moai.lower import lower
from moai.lower.inputs import global_batch
from moai.lower.program import Program
from moai.lower.sampling import observe
from moai.plan.plan import Plan
from moai.plan.search import Candidate, NoPlan, Step, search
from moai.plan.space import Allowed
from moai.plan.timings import Described
from moai.platform import clusters
from moai.platform.device import Device
from moai.runtime.accelerator import Accelerator
from moai.runtime.measure import VARIABLE

SHARE = 0.8  # of a device's memory that a plan may use, where the user says nothing else
_DEVICES = 2
_BUDGETS = 5  # that are tried with a model and batch
_RANGE = (0.5, 1.1)  # of what is needed where nothing is spared
# What trials are restricted to, in turn; without, matrices are mostly split, which leaves little else to choose.
_ALLOWED = (Allowed(tp=1), Allowed())
_LAVISH = Allowed(tp=1, micro=1, recompute=("none",), distribute_param=False)
_ALL = 1 << 50


@dataclass(frozen=True, slots=True)
class Trial:
    """Bytes of a device: its `memory`, and what the `plan` is `predicted` and `counted` to need. None: refused."""

    script: Script
    memory: int
    plan: str | None
    predicted: float = 0.0
    counted: int = 0

    @property
    def fails(self) -> bool:
        return self.counted > self.memory


class Trials:
    """Runs trials on CPU workers, which count into files in `folder`."""

    def __init__(self, recorder: Recording, folder: Path, n_devices: int = _DEVICES) -> None:
        self._recorder, self._folder = recorder, folder
        self._devices = [Device("cpu", i, _ALL, 1) for i in range(n_devices)]
        self._cluster = clusters.of_devices(self._devices)
        with patch.dict(os.environ, {VARIABLE: str(folder / "counted"), "MOAI_COMPILE": "never"}):
            self._accelerator = Accelerator(self._devices)

    def close(self) -> None:
        """Ends the workers."""
        self._accelerator.close()

    def of(self, script: Script, dice: random.Random, budgets: int = _BUDGETS) -> Iterator[Trial]:
        """Trials of a script with so many budgets."""
        steps = self._recorder.steps(script)
        graph = steps.first
        batch = global_batch(graph, [None] * len(graph.inputs))
        step = Step(cache(lambda plan: observe(graph, plan)), batch)
        counted = cache(lambda plan: self._counted(steps, plan))
        usual = _needed(self._chosen(step, _ALL, _LAVISH))
        for trial in range(budgets):
            memory = int(usual * dice.uniform(*_RANGE) / SHARE)
            try:
                best = self._chosen(step, int(memory * SHARE), _ALLOWED[trial % len(_ALLOWED)])
            except NoPlan:
                yield Trial(script, memory, None)
                continue
            yield Trial(script, memory, str(best.plan), _needed(best), counted(best.plan))

    def _chosen(self, step: Step, budget: int, allowed: Allowed) -> Candidate:
        return search(step, self._cluster, Described(self._cluster), budget, allowed, Plan()).best

    def _counted(self, steps: Steps, plan: Plan) -> int:
        """Bytes of the fullest device in the fuller of both steps."""
        for graph, scalars in ((steps.first, steps.first_scalars), (steps.later, steps.later_scalars)):
            self._run(graph, lower(graph, plan, [None] * len(graph.inputs)), scalars)
        lines = [json.loads(line) for file in self._folder.glob("counted.*") for line in file.open()]
        for file in self._folder.glob("counted.*"):
            file.unlink()
        return int(max(line["counted"] for line in lines))

    def _run(self, graph: StepGraph, program: Program, scalars: Sequence[float | int]) -> None:
        it = self._accelerator
        inputs = [it.upload(x, s.placement, program.mesh) for x, s in zip(made_up(graph), program.inputs, strict=True)]
        it.run(program, inputs, scalars)
        it.synchronize()
        it.forget()


def _needed(candidate: Candidate) -> float:
    assert candidate.prediction is not None
    return candidate.prediction.memory.total


def script_of(dice: random.Random) -> Script:
    """A random small model with a batch."""
    common: dict[str, Any] = {"vocab_size": dice.choice((100, 500, 2000)), "bos_token_id": 0, "eos_token_id": 0}
    hidden, layers = dice.choice((32, 64, 128, 192)), dice.randint(1, 6)
    batch, sequence = dice.choice((2, 3, 4, 6, 8, 12)), dice.choice((16, 32, 64, 96))
    if dice.random() < 1 / 3:
        sizes = {"n_embd": hidden, "n_layer": layers, "n_head": 4, "n_positions": 96}
        return Script("GPT2Config", {**sizes, **common}, batch, sequence)
    sizes = {"hidden_size": hidden, "intermediate_size": dice.choice((2, 3, 4)) * hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "num_key_value_heads": dice.choice((2, 4))}
    tied = {"tie_word_embeddings": dice.random() < 0.5}
    return Script(dice.choice(("LlamaConfig", "Qwen2Config")), {**sizes, **heads, **tied, **common}, batch, sequence)


def trials(wanted: int, seed: int, budgets: int = _BUDGETS) -> Iterator[Trial]:
    """Trials until `wanted` of them were run, and those that were refused on the way."""
    dice = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder, recording() as recorder:
        it = Trials(recorder, Path(folder))
        try:
            while wanted > 0:
                for trial in it.of(script_of(dice), dice, budgets):
                    yield trial
                    wanted -= trial.plan is not None
        finally:
            it.close()


def summary(found: Sequence[Trial]) -> dict[str, Any]:
    """Figures of many trials. `counted`: over what was predicted; `filled`: over the devices' memory."""
    run = [trial for trial in found if trial.plan is not None]
    return {
        "trials": len(run),
        "plans": len({trial.plan for trial in run}),
        "refused": len(found) - len(run),
        "failed": sum(trial.fails for trial in run),
        "beyond_budget": sum(trial.counted > trial.memory * SHARE for trial in run),
        "counted": results.quartiles(trial.counted / trial.predicted for trial in run),
        "counted_most": max(trial.counted / trial.predicted for trial in run),
        "filled_most": max(trial.counted / trial.memory for trial in run),
        "filled_mean": statistics.mean(trial.counted / trial.memory for trial in run),
    }


def table(figures: dict[str, Any]) -> str:
    """The summary as Markdown."""
    rows = [
        ("trials that were run", str(figures["trials"])),
        ("different plans", str(figures["plans"])),
        ("refused, as no plan fits", str(figures["refused"])),
        ("out of memory", str(figures["failed"])),
        ("beyond the planner's budget", str(figures["beyond_budget"])),
        ("counted / predicted", f"{results.spread(figures['counted'])}, at most {figures['counted_most']:.3f}"),
        ("counted / memory", f"mean {figures['filled_mean']:.3f}, at most {figures['filled_most']:.3f}"),
    ]
    return results.markdown(("", ""), rows)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a chosen plan runs out of memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fits", description="Does what is chosen fit?")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--trials", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.trials < 1:
        parser.error("--trials must be 1 or more")
    machine = results.provenance()
    found = []
    for trial in trials(options.trials, options.seed):
        found.append(trial)
        print(f"{trial.plan}: {trial.counted / trial.memory:.2f} of the memory", file=sys.stderr, flush=True)
    figures = {**summary(found), "worst": [asdict(trial) for trial in found if trial.fails]}
    print(table(figures))
    if options.json:
        results.write_json(options.json, {**figures, "all": [asdict(trial) for trial in found], "run": machine})
    if options.record:
        results.record(f"Fits ({options.trials} trials)", table(figures), machine)
    return 1 if figures["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
