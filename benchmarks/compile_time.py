"""How long one waits for compiled code: `python -m benchmarks.compile_time`.

Each way of compiling, ours and PyTorch's, trains the same models of several depths on two CPU devices, twice: with an
empty cache on disk, and with the cache that the first left behind. One variant runs at a time, in new processes.

Figures, by variant, depth ("6" layers) and cache ("cold", "warm"): the seconds that the first `FIRST_STEPS` steps took
beyond what as many later ones do. All of it counts that a user waits for: tracing or capture, passes, the compiler.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peers.teams import start
from benchmarks.training import SMALL, Sizes, sizes

VARIANTS = (
    *("ddp_compiled", "ddp_layers_compiled", "fsdp2_layers_compiled"),
    *("moai_compiled", "moai_sharded_low_compiled"),
)
CACHES = ("cold", "warm")
FIRST_STEPS = 4
LATER_STEPS = 6


def wait_s(name: str, model: Sizes, folder: Path) -> float:
    """Seconds lost at the start of a variant whose cache is in `folder`. RuntimeError if it fails."""
    team = start(name, model, even=False, folder=folder)
    try:
        team.run_block(FIRST_STEPS)
        for _ in range(LATER_STEPS):
            team.run_block(1)
    finally:
        team.close()
    if team.failure is not None:
        raise RuntimeError(team.failure)
    first, *later = team.step_s
    return (first - statistics.median(later)) * FIRST_STEPS


def measure(names: Sequence[str], models: Mapping[str, Sizes]) -> tuple[dict[str, Any], dict[str, str]]:
    """The figures of the module docstring for models by depth; and, by variant, why some have none."""
    figures: dict[str, Any] = {}
    failures: dict[str, str] = {}
    for name in names:
        try:
            figures[name] = {depth: _cold_and_warm(name, model) for depth, model in models.items()}
        except RuntimeError as error:
            failures[name] = str(error)
    return figures, failures


def _cold_and_warm(name: str, model: Sizes) -> dict[str, float]:
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        for cache in CACHES:
            print(f"{name}, {model.layers} layers, {cache}", file=sys.stderr, flush=True)
            found[cache] = wait_s(name, model, Path(scratch) / name)
    return found


def table(figures: Mapping[str, Any]) -> str:
    """The figures as Markdown."""
    found = figures["wait_s"]
    columns = [(depth, cache) for depth in figures["layers"] for cache in CACHES]
    head = ("seconds lost at the start", *(f"{depth} layers, {cache}" for depth, cache in columns))
    rows = [(name, *(f"{found[name][depth][cache]:.1f}" for depth, cache in columns)) for name in found]
    failed = [f"\n\n{name} failed: {reason.strip().splitlines()[-1]}" for name, reason in figures["failures"].items()]
    others = f"\n\nOther programs took {figures['others_cpu']:.0%} of the machine's time."
    return results.markdown(head, rows) + "".join(failed) + others


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; 1 if a variant failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.compile_time", description="How long compiled training takes to begin."
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--record", action="store_true", help="append them to benchmarks/RESULTS.md")
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"some of {','.join(VARIANTS)}")
    parser.add_argument("--layers", default="6,12", help="depths, with commas between")
    parser.add_argument("--small", action="store_true", help="models without weight")
    options = parser.parse_args(arguments)
    names = options.variants.split(",")
    if not set(names) <= set(VARIANTS):
        parser.error(f"--variants: expected some of {','.join(VARIANTS)}")
    try:
        depths = [int(depth) for depth in options.layers.split(",")]
    except ValueError:
        parser.error("--layers: expected numbers, with commas between")
    models = {str(depth): replace(SMALL, layers=depth) if options.small else sizes(depth) for depth in depths}
    machine = results.provenance()
    neighbours = results.Neighbours()
    waits, failures = measure(names, models)
    others = neighbours.share()
    figures = {"wait_s": waits, "failures": failures, "layers": list(models), "others_cpu": others, "run": machine}
    print(table(figures))
    if options.json:
        results.write_json(options.json, figures)
    if options.record:
        results.record("Compile time", table(figures), machine)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
