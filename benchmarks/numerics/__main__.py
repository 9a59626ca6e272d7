"""Are the numbers of every plan those of one device?

    python -m benchmarks.numerics                     # every model; plans with all pairs of settings, and with stages
    python -m benchmarks.numerics --quick             # a minute's check
    python -m benchmarks.numerics --plans full        # every combination: hours
    python -m benchmarks.numerics --plans dp=2,tp=2,micro=4,precision=fp64 --models llama gpt2
    python -m benchmarks.numerics --record            # and write docs/numerics.md

Ends with status 1 if numbers differ by more than their bound, or there are none where there should be; a plan that is
refused is no such case.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

from benchmarks.numerics import report
from benchmarks.numerics.models import MODELS
from benchmarks.numerics.plans import Point, parse_all
from benchmarks.numerics.run import Row, Runner, applies, case_of, compare
from benchmarks.results import provenance, write_json

QUICK_MODELS, QUICK_STEPS = ("plain", "llama", "gpt2"), 3


def rows_of(runner: Runner, point: Point, models: Sequence[str], steps: int) -> list[Row]:
    """All rows of a plan."""
    cases = {model: case_of(model, point, steps) for model in models if applies(model, point)}
    found = runner.run(point, list(cases.values()))
    return [compare(runner, point, model, found[case], steps) for model, case in cases.items()]


def run_all(points: Sequence[Point], models: Sequence[str], steps: int, jobs: int) -> Iterator[list[Row]]:
    """The rows of every plan, in order; `jobs` plans run side by side."""
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(jobs) as pool:
        runner = Runner(Path(folder))
        runner.prepare([case_of(model, point, steps) for point in points for model in models if applies(model, point)])
        yield from pool.map(lambda point: rows_of(runner, point, models, steps), points)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.numerics", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument(
        "--plans",
        nargs="+",
        metavar="PLAN",
        help='"pairs", "stages", "kinds" (one setting each), "full", or as in MOAI_PLAN',
    )
    parser.add_argument("--devices", type=int, default=4, help="the most devices that a plan may have (default 4)")
    parser.add_argument("--steps", type=int, help="steps of training (default 10)")
    parser.add_argument("--quick", action="store_true", help="few models, steps and plans, unless they are given")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 4), help="plans side by side")
    parser.add_argument("--list", action="store_true", help="print the plans, and run nothing")
    parser.add_argument("--record", action="store_true", help=f"write {report.FILE.relative_to(report.ROOT)}")
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the rows")
    return parser.parse_args()


def main() -> None:
    """The command."""
    arguments = _arguments()
    models = arguments.models or (QUICK_MODELS if arguments.quick else tuple(MODELS))
    steps = arguments.steps or (QUICK_STEPS if arguments.quick else 10)
    try:
        points = parse_all(
            arguments.plans or (["kinds"] if arguments.quick else ["pairs", "stages"]), arguments.devices
        )
    except ValueError as error:
        sys.exit(f"--plans: {error}")
    if arguments.list:
        print(*points, sep="\n")
        return
    rows: list[Row] = []
    for some in run_all(points, models, steps, arguments.jobs):
        rows += some
        print(some[0].point, *(f"{row.model} {report.cell(row)}" for row in some), sep="  ", flush=True)
    print(f"\n{report.tables(rows)}")
    if arguments.json:
        write_json(arguments.json, {**provenance(), "steps": steps, "rows": [asdict(row) for row in rows]})
    if arguments.record:
        report.FILE.write_text(report.document(rows, steps, provenance()))
    outcomes = Counter(row.outcome for row in rows)
    print(", ".join(f"{n} {outcome}" for outcome, n in outcomes.items()))
    sys.exit(1 if outcomes["differs"] or outcomes["failed"] else 0)


if __name__ == "__main__":
    main()
