"""The command line: `python -m benchmarks.peers`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peers import report
from benchmarks.peers.teams import N_DEVICES, WARM_UP_ROUNDS, take_turns
from benchmarks.peers.variants import COMPARISONS
from benchmarks.training import SMALL, Sizes, sizes


def compare(names: Sequence[str], model: Sizes, even: bool, rounds: int, steps: int) -> dict[str, Any]:
    """The figures of `report` for one comparison, and of the machine meanwhile."""
    machine = results.provenance()
    neighbours = results.Neighbours()
    teams = take_turns(names, model, even, rounds, steps)
    labels = "even" if even else "uneven"
    settings = asdict(model) | {"devices": N_DEVICES, "rounds": rounds, "steps": steps, "labels": labels}
    return report.summarize(teams, steps) | {"others_cpu": neighbours.share(), "settings": settings, "run": machine}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a variant failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description="Step time beside PyTorch's own ways to spread a model over two CPU devices.",
    )
    parser.add_argument("--compare", type=_names, default=tuple(COMPARISONS), help=f"of {','.join(COMPARISONS)}")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--rounds", type=int, default=10, help=f"timed rounds, after {WARM_UP_ROUNDS} to warm up")
    parser.add_argument("--steps", type=int, default=4, help="steps of a variant in a round")
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384, help="a multiple of 12")
    parser.add_argument("--small", action="store_true", help="a model without weight, to see whether everything works")
    parser.add_argument("--even", action="store_true", help="no label is ignored: every loss must be the exact one")
    options = parser.parse_args(arguments)
    if min(options.rounds, options.steps, options.layers, options.hidden) < 1 or options.hidden % 12:
        parser.error("--rounds, --steps and --layers must be 1 or more, --hidden a multiple of 12")
    model = SMALL if options.small else sizes(options.layers, options.hidden)
    found = {}
    for name in options.compare:
        apart = (
            name == "pipeline"
        )  # what is split by hand has no tied weights, and the mean of parts' means as its loss
        its = replace(model, tied=False) if apart else model
        figures = compare(COMPARISONS[name], its, options.even or apart, options.rounds, options.steps)
        found[name] = figures
        said = f"Peers, {name} ({', '.join(f'{v} {k}' for k, v in figures['settings'].items())})"
        print(f"{said}\n\n{report.table(figures)}\n", flush=True)
        if options.json:
            results.write_json(options.json, found)
        if options.record:
            results.record(said, report.table(figures), figures["run"])
    return 1 if any(figures["failures"] for figures in found.values()) else 0


def _names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not set(names) <= set(COMPARISONS):
        raise argparse.ArgumentTypeError(f"{text}: expected some of {','.join(COMPARISONS)}")
    return names


if __name__ == "__main__":
    sys.exit(main())
