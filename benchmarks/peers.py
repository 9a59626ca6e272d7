"""Step time beside what a user could run instead: `python -m benchmarks.peers`.

The same model, initial weights, global batches and optimizer, in each way of `variants`, on two CPU devices of this
machine. All variants are alive at once and take turns in short blocks of steps, in an order that changes with every
round; who is not running sleeps. A ratio is taken within each round, so that the machine's moods hit both sides.

Figures: `step_s`, seconds a step; `cpu_s`, CPU seconds a step of all processes of a variant, which other programs
disturb less; `ratios`, step time of this project (`moai`) over each of the others; `foreach_ratios`, the same for
`moai_foreach`; each with its quartiles over the rounds. `losses`: the loss of each block's last step, `exact` being
that of one process on the whole batch, and `loss_error` the largest difference from it. A data-parallel peer's loss is
the mean over its ranks.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.child import Child, receive_all
from benchmarks.training import Sizes
from benchmarks.variants import VARIANTS
from moai.platform import accelerators
from moai.platform.device import Device
from moai.runtime.launcher import cores_of, worker_environment

N_DEVICES = 2
OURS = ("moai", "moai_foreach")
EXACT = "plain"
WARM_UP_ROUNDS = 2
START_SECONDS = 120.0
BLOCK_SECONDS = 300.0
# OpenMP's threads spin for a moment after their work: let those of one variant come to rest before the next begins.
SETTLE_SECONDS = 0.05

SMALL = Sizes(layers=2, hidden=64, intermediate=128, heads=4, kv_heads=2, vocab=512, seq=32, batch=8)


def sizes(layers: int, hidden: int) -> Sizes:
    """A Qwen2 that is large enough for kernels to decide the time, and small enough for two cores."""
    return Sizes(
        layers=layers, hidden=hidden, intermediate=2 * hidden, heads=6, kv_heads=2, vocab=4096, seq=256, batch=8
    )


@dataclass(slots=True)
class Team:
    """The processes of one variant, and what they did: seconds and CPU seconds a step, and loss, block by block."""

    name: str
    children: list[Child]
    step_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def run_block(self, steps: int) -> None:
        """Run `steps` steps; the clock stops when every process has read its loss."""
        cpu_begin, begin = self._cpu_seconds(), time.perf_counter()
        for child in self.children:
            child.send(steps)
        losses = receive_all(self.children, BLOCK_SECONDS)
        self.step_s.append((time.perf_counter() - begin) / steps)
        self.cpu_s.append((self._cpu_seconds() - cpu_begin) / steps)
        self.losses.append(sum(losses) / len(losses))

    def _cpu_seconds(self) -> float:
        return sum(results.cpu_seconds(child.pid) for child in self.children)


def start(name: str, sizes: Sizes, devices: Sequence[Device], scratch: Path) -> Team:
    """The processes of a variant, ready to run. All compute with one device's threads, cores and malloc settings."""
    children: list[Child] = []
    how = VARIANTS[name]
    ranks = len(devices) if how.spread else 1
    common = {"variant": name, "sizes": asdict(sizes), "ranks": ranks, "meeting": str(scratch / name)}
    try:
        for rank in range(ranks):
            if how.spread:
                threads, cores = devices[rank].threads, cores_of(devices[rank], devices)
            else:
                threads, cores = sum(device.threads for device in devices), ()
            if name in OURS:
                environment = _script_environment(len(devices), scratch)
            else:
                environment = worker_environment(os.environ, devices[rank]) | {"OMP_NUM_THREADS": str(threads)}
            part = common | {"rank": rank, "threads": threads, "cores": cores}
            children.append(Child(f"{name}, process {rank}", "benchmarks.variants:train", part, environment))
        receive_all(children, START_SECONDS)
    except BaseException:
        for child in children:
            child.close()
        raise
    return Team(name, children)


def _script_environment(n_devices: int, scratch: Path) -> dict[str, str]:
    """That of a user's script: nothing but the accelerator's size is said. Its job is not the user's, nor its state."""
    environment = {**os.environ, "MOAI_DEVICES": str(n_devices), "XDG_STATE_HOME": str(scratch)}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    environment.pop("MOAI_FLAVOR", None)
    return environment


def compare(names: Sequence[str], sizes: Sizes, rounds: int, steps: int) -> dict[str, Team]:
    """Run all variants, with `WARM_UP_ROUNDS` more rounds at the start."""
    devices = accelerators.choose({"MOAI_DEVICES": str(N_DEVICES), "CUDA_VISIBLE_DEVICES": ""}).flavor.devices
    teams: dict[str, Team] = {}
    order = random.Random(0)
    with tempfile.TemporaryDirectory() as scratch:
        try:
            for name in names:
                print(f"starting {name}", file=sys.stderr, flush=True)
                teams[name] = start(name, sizes, devices, Path(scratch))
            for turn in range(WARM_UP_ROUNDS + rounds):
                print(f"round {turn + 1} of {WARM_UP_ROUNDS + rounds}", file=sys.stderr, flush=True)
                for name in order.sample(names, len(names)):
                    time.sleep(SETTLE_SECONDS)
                    teams[name].run_block(steps)
        finally:
            for team in teams.values():
                for child in team.children:
                    child.close()
    return teams


def summarize(teams: Mapping[str, Team]) -> dict[str, Any]:
    """The figures of the module docstring."""
    timed = {name: team.step_s[WARM_UP_ROUNDS:] for name, team in teams.items()}
    exact = teams[EXACT].losses

    def ratios(ours: str) -> dict[str, Any]:
        others = {name: times for name, times in timed.items() if name != ours}
        return {
            name: results.quartiles(mine / theirs for mine, theirs in zip(timed[ours], times, strict=True))
            for name, times in others.items()
        }

    return {
        "ratios": ratios("moai"),
        "foreach_ratios": ratios("moai_foreach"),
        "step_s": {name: results.quartiles(times) for name, times in timed.items()},
        "cpu_s": {name: results.quartiles(team.cpu_s[WARM_UP_ROUNDS:]) for name, team in teams.items()},
        "losses": {"exact": exact} | {name: team.losses for name, team in teams.items() if name != EXACT},
        "loss_error": {
            name: max(abs(a - b) for a, b in zip(team.losses, exact, strict=True))
            for name, team in teams.items()
            if name != EXACT
        },
    }


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    columns = ("", "step, ms: median (q25-q75)", "CPU, ms", "moai / it", "moai_foreach / it", "loss error")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, step in figures["step_s"].items():
        ratios = [figures[key].get(name) for key in ("ratios", "foreach_ratios")]
        cells = [results.spread(step, 1e3, digits=1), f"{figures['cpu_s'][name]['median'] * 1e3:.0f}"]
        cells += [results.spread(r) if r else "" for r in ratios]
        error = figures["loss_error"].get(name)
        cells.append("exact" if error is None else f"{error:.1e}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"Other programs took {figures['others_cpu']:.0%} of the machine's time."])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Step time beside plain PyTorch, DDP and FSDP2 on two CPU devices.",
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--rounds", type=int, default=10, help=f"timed rounds, after {WARM_UP_ROUNDS} to warm up")
    parser.add_argument("--steps", type=int, default=4, help="steps of a variant in a round")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384, help="a multiple of 12")
    parser.add_argument("--small", action="store_true", help="a model without weight, to see whether everything works")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.steps, options.layers, options.hidden) < 1 or options.hidden % 12:
        parser.error("--rounds, --steps and --layers must be 1 or more, --hidden a multiple of 12")
    model = SMALL if options.small else sizes(options.layers, options.hidden)
    machine = results.provenance()
    neighbours = results.Neighbours()
    teams = compare(list(VARIANTS), model, options.rounds, options.steps)
    settings = asdict(model) | {"devices": N_DEVICES, "rounds": options.rounds, "steps": options.steps}
    figures = summarize(teams) | {"others_cpu": neighbours.share(), "settings": settings, "run": machine}
    said = ", ".join(f"{v} {k}" for k, v in settings.items())
    print(f"peers ({said})\n\n{table(figures)}")
    if options.json:
        results.write_json(options.json, figures)
    if options.record:
        results.record(f"Peers ({said})", table(figures), machine)


if __name__ == "__main__":
    main()
