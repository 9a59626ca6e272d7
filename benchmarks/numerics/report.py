"""The report: rows of comparisons as a table in Markdown."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.child import ROOT
from benchmarks.numerics.models import MODELS
from benchmarks.numerics.plans import PRECISION, Point
from benchmarks.numerics.run import TOLERANCE, Row

FILE = ROOT / "docs" / "numerics.md"

_TITLES = {
    "fp64": "Models in fp64",
    "fp32": "Models in fp32",
    "bf16": "Models in fp32, products in bf16",
}
_INTRODUCTION = f"""# Numerics

Every plan gives the numbers of one device. The tables are made by `python -m benchmarks.numerics --record`; what is
trained, and how it is compared, is said in [benchmarks/numerics](../benchmarks/numerics).

Small models of real architectures train on batches with padding, with labels that are ignored unevenly, and of a size
that the plan's parts do not divide; gradients are clipped by their norm. A cell is the worst of all losses, of the
gradients' norms, and of all parameters at the end: the relative difference from the same script under plain PyTorch on
the CPU. In bf16 it is the distance from plain PyTorch under autocast, and its unit is how far that is from fp32, since
two runs that round differently agree no better. Random numbers are the accelerator's own, so a model that draws some
is compared with the accelerator on one device instead: {", ".join(n for n, m in MODELS.items() if m.draws)}.

Bounds: {TOLERANCE["fp64"]:.0e} where a model stays in fp64 ({", ".join(n for n, m in MODELS.items() if m.stays_fp64)}),
{TOLERANCE["fp64 with fp32"]:.0e} where its own code drops to fp32 on the way, {TOLERANCE["fp32"]:.0e} in fp32,
{TOLERANCE["bf16"]:.0f} in bf16. **Bold** is beyond its bound; what was refused or failed has its reason below.
"""


def cell(row: Row) -> str:
    """One comparison in a word."""
    if not row.differences:
        return row.outcome
    worst = max(row.differences) if all(d == d for d in row.differences) else float("nan")
    text = f"{worst:.2f}" if row.point.precision == "bf16" else f"{worst:.0e}"
    return f"**{text}**" if row.outcome == "differs" else text


def tables(rows: Sequence[Row]) -> str:
    """A table for each precision, plans by models; then what was refused or failed, each reason once."""
    parts = []
    for precision in PRECISION:
        some = [row for row in rows if row.point.precision == precision]
        if some:
            parts.append(f"## {_TITLES[precision]}\n\n{_table(some)}")
    reasons = _reasons(rows)
    if reasons:
        parts.append(f"## Without numbers\n\n{reasons}")
    return "\n\n".join(parts) + "\n"


def _table(rows: Sequence[Row]) -> str:
    models = list(dict.fromkeys(row.model for row in rows))
    by_plan: dict[Point, dict[str, str]] = defaultdict(dict)
    for row in rows:
        by_plan[row.point][row.model] = cell(row)
    lines = [f"| plan | {' | '.join(models)} |", "|---" * (len(models) + 1) + "|"]
    lines += [f"| {_short(p)} | {' | '.join(cells.get(m, '') for m in models)} |" for p, cells in by_plan.items()]
    return "\n".join(lines)


def _short(point: Point) -> str:
    return str(point).rpartition(",")[0].replace(",", ", ")


def _reasons(rows: Sequence[Row]) -> str:
    lines = []
    for row in rows:
        if row.reason:
            *_, last = row.reason.splitlines()
            lines.append(f"- {row.model}, `{row.point}`, {row.outcome}: {last}")
    return "\n".join(lines)


def document(rows: Sequence[Row], steps: int, run: Mapping[str, Any]) -> str:
    """The whole of docs/numerics.md; `run` is what `results.provenance` gave."""
    machine = f"{run['cpu']}, {run['cores']} cores, {run['memory_gib']} GiB; torch {run['torch']}"
    return f"{_INTRODUCTION}\n{run['date']}, commit {run['commit']}, {steps} steps. {machine}.\n\n{tables(rows)}"
