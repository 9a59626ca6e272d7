"""How far are predictions from training speeds that others published?

python -m benchmarks.published --csv FILE [--json [FILE]] [--record] [--fit]

Each row is predicted from its own columns, by the cost model of the planner (moai.plan.cost) with the constants of the
cluster files. "Left out" are the same rows, with constants that were calibrated without all rows of their source: to
the others of their hardware, from where hardware of the same kind and measurements of other people have them begin.
Rows that do not say enough are not predicted, with the reason. --fit calibrates the constants to FILE and writes them
to the cluster files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.published.calibrate import Calibration, at_bounds
from benchmarks.published.constants import Constants, fitted_to, shipped, write
from benchmarks.published.predicting import Predictor
from benchmarks.published.report import Predicted, report, table
from benchmarks.published.rows import read
from benchmarks.results import provenance, record, write_json


def main() -> int:
    options = _options()
    cases, left_out = read(options.csv)
    if not cases:
        print(f"No row of {options.csv} can be predicted.", *_reasons(left_out), sep="\n", file=sys.stderr)
        return 1
    predictors = [Predictor(case) for case in cases]
    if options.fit:
        write(Calibration(predictors).every())
        print("The cluster files hold the constants that were fitted.", file=sys.stderr)
        return 0
    found = _found(predictors, left_out)
    if options.json == "-":
        print(json.dumps(found, indent=2))
    else:
        print(_text(found))
        if options.json:
            write_json(Path(options.json), found)
    if options.record:
        record("Published", _text(found), provenance())
    return 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.published", description=__doc__.split("\n")[0])
    parser.add_argument(
        "--csv", type=Path, required=True, help="the published runs; docs/published.md names its columns"
    )
    parser.add_argument(
        "--json", nargs="?", const="-", metavar="FILE", help="print figures as JSON, or keep them in FILE"
    )
    parser.add_argument("--record", action="store_true", help="append the table to benchmarks/RESULTS.md")
    parser.add_argument("--fit", action="store_true", help="calibrate the constants of the cluster files to the rows")
    return parser.parse_args()


def _found(predictors: Sequence[Predictor], left_out: Mapping[str, str]) -> dict[str, Any]:
    hardware = sorted({p.case.hardware for p in predictors})
    constants = {name: shipped(name) for name in hardware}
    predicted = [(p.case, p.outcome(constants[p.case.hardware])) for p in predictors]
    return {
        "rows": len(predictors) + len(left_out),
        "predicted": len(predictors),
        "left_out": dict(left_out),
        "figures": report(predicted, _without_source(predictors, constants)),
        "constants": {name: {key: asdict(c) for key, c in known.items()} for name, known in constants.items()},
        "at_bounds": at_bounds(constants),
    }


def _without_source(predictors: Sequence[Predictor], constants: Mapping[str, Constants]) -> list[Predicted]:
    """Each case, predicted with constants that were not fitted to its source."""
    calibration = Calibration(predictors)
    predicted = []
    for p in predictors:
        known = constants[p.case.hardware]
        if p.case.source in fitted_to(known):
            known = calibration.constants(p.case.hardware, p.case.source)
        predicted.append((p.case, p.outcome(known)))
    return predicted


def _text(found: Mapping[str, Any]) -> str:
    lines = [table(found["figures"]), "", "Percent. " + _LEGEND, ""]
    lines += [f"Of {found['rows']} rows {found['predicted']} were predicted.", *_reasons(found["left_out"])]
    lines.append(f"Constants at a bound: {', '.join(found['at_bounds']) or 'none'}.")
    return "\n".join(lines)


_LEGEND = (
    "left out: without the source's rows in the calibration. under: rows whose memory is predicted too small by 10 %."
)


def _reasons(left_out: Mapping[str, str]) -> list[str]:
    reasons: dict[str, list[str]] = defaultdict(list)
    for row, reason in left_out.items():
        reasons[reason].append(row)
    return [f"{len(rows)} rows left out: {reason} ({', '.join(rows[:3])}...)" for reason, rows in reasons.items()]


if __name__ == "__main__":
    sys.exit(main())
