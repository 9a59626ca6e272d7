"""The command line of benchmarks that go through models and numbers of CPU workers.

In: models by name, and what is to be found of each on so many workers. Out: a table on the screen, and in files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.steps import Script, Steps, recording

Figures = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Benchmark:
    """`name`: of the module. `counts`: the option's name, what it counts, and its default. `quick`: what that leaves.
    `figures`: of a model's steps, on so many workers, quickly or not. `text`: of all figures."""

    name: str
    description: str
    models: Mapping[str, Script]
    counts: tuple[str, str, str]
    quick: str
    figures: Callable[[Steps, int, bool], dict[str, Any]]
    text: Callable[[Figures], str]


def run(it: Benchmark, arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    option, counted, default = it.counts
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{it.name}", description=it.description)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--models", default=",".join(it.models), help=f"some of {','.join(it.models)}")
    parser.add_argument(option, dest="counts", default=default, help=f"numbers of {counted}, with commas between")
    parser.add_argument("--quick", action="store_true", help=it.quick)
    options = parser.parse_args(arguments)
    names = options.models.split(",")
    if not set(names) <= set(it.models):
        parser.error(f"--models: expected some of {','.join(it.models)}")
    try:
        counts = [int(n) for n in options.counts.split(",")]
    except ValueError:
        parser.error(f"{option}: expected numbers, with commas between")
    os.environ["MOAI_COMPILE"] = "never"  # for the workers
    machine = results.provenance()
    neighbours = results.Neighbours()
    found = {}
    with recording() as recorder:
        for name in names:
            steps = recorder.steps(it.models[name])
            for n in counts:
                print(f"{name} on {n}", file=sys.stderr, flush=True)
                found[f"{name}, {n}"] = it.figures(steps, n, options.quick)
    others = neighbours.share()
    text = f"{it.text(found)}Other programs took {others:.0%} of the machine's time."
    print(text)
    if options.json:
        results.write_json(options.json, {"by_model": found, "others_cpu": others, "run": machine})
    if options.record:
        results.record(it.name.capitalize(), text, machine)
