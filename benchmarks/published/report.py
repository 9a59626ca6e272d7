"""What predictions are worth: errors of time and memory, regret, and how many intervals hold.

In: cases and the outcomes predicted for them. Out: figures, and tables of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

import numpy as np

from benchmarks.published.predicting import Outcome
from benchmarks.published.rows import Case, Variant
from benchmarks.results import markdown
from moai.plan.cost import INDISTINCT

Predicted = tuple[Case, Outcome]
# Where a column is not stated: the interval is that of its values, this much wider to both sides.
WIDER = 0.10
_UNDER = 0.10
_TOP = 3


def step_errors(predicted: Sequence[Predicted]) -> dict[str, float]:
    """Of relative errors: their number, the median and the 90th percentile of their sizes, and their mean."""
    return _errors([outcome.step_s / case.step_s - 1 for case, outcome in predicted])


def memory_errors(predicted: Sequence[Predicted]) -> dict[str, float] | None:
    """The same of memory where its metric is known, and the share of rows whose memory is predicted too small by more
    than 10 %; None without such rows."""
    pairs = [(c.memory_bytes, o.memory_bytes) for c, o in predicted if c.memory_bytes and c.memory_metric]
    if not pairs:
        return None
    errors = [found / measured - 1 for measured, found in pairs]
    return {**_errors(errors), "under": fmean(error < -_UNDER for error in errors)}


def _errors(errors: Sequence[float]) -> dict[str, float]:
    sizes = np.abs(errors)
    return {
        "n": len(sizes),
        "median": float(np.median(sizes)),
        "p90": float(np.quantile(sizes, 0.9)),
        "bias": fmean(errors),
    }


def regret(predicted: Iterable[Predicted]) -> dict[str, float] | None:
    """Of groups of rows that solve one problem by two plans or more: the time of the chosen plan over the best one's,
    less one; and the share of groups whose best plan is in the three predicted to be fastest. Of plans whose predicted
    times are not told apart from the least, the one with the fewest stages is chosen, then the one with the largest dp.
    """
    groups: dict[tuple[object, ...], dict[Any, list[Predicted]]] = defaultdict(lambda: defaultdict(list))
    for case, outcome in predicted:
        groups[case.problem][case.variants].append((case, outcome))
    regrets, top = [], []
    for plans in groups.values():
        if len(plans) < 2:
            continue
        # A plan that was measured several times counts once.
        times = [(p[0][1].step_s, median(c.step_s for c, _ in p)) for p in plans.values()]
        order = [measured for _, measured in sorted(times)]
        least = min(times)[0]
        alike = [(*_stages(p), *t) for p, t in zip(plans, times, strict=True) if t[0] <= least * (1 + INDISTINCT)]
        regrets.append(min(alike)[-1] / min(order) - 1)
        top.append(min(order) in order[:_TOP])
    if not regrets:
        return None
    return {
        "groups": len(regrets),
        "mean": fmean(regrets),
        "p90": float(np.quantile(regrets, 0.9)),
        "worst": max(regrets),
        "top_three": fmean(top),
    }


def _stages(variants: Sequence[Variant]) -> tuple[int, int]:
    return variants[0].layout.pp, -variants[0].layout.dp


def coverage(predicted: Iterable[Predicted]) -> dict[str, float] | None:
    """Of rows that do not state everything: how many, and the share whose time lies in the predicted interval."""
    held = [interval(o)[0] <= c.step_s <= interval(o)[1] for c, o in predicted if c.unstated]
    return {"n": len(held), "held": fmean(held)} if held else None


def interval(outcome: Outcome) -> tuple[float, float]:
    return outcome.low_s * (1 - WIDER), outcome.high_s * (1 + WIDER)


def figures(predicted: Sequence[Predicted], left_out: Sequence[Predicted]) -> dict[str, Any]:
    """All figures of some rows. `left_out`: the same rows, predicted without their own source."""
    return {
        "step": step_errors(predicted),
        "memory": memory_errors(predicted),
        "regret": regret(predicted),
        "interval": coverage(predicted),
        "source_left_out": {"step": step_errors(left_out), "regret": regret(left_out)},
    }


def report(predicted: Sequence[Predicted], left_out: Sequence[Predicted]) -> dict[str, Any]:
    """Figures by "source, hardware", and pooled under "all"."""
    groups: dict[str, list[int]] = defaultdict(list)
    for i, (case, _) in enumerate(predicted):
        groups[f"{case.source}, {case.hardware}"].append(i)
    every = {"all": list(range(len(predicted)))} if predicted else {}
    return {
        name: figures([predicted[i] for i in rows], [left_out[i] for i in rows])
        for name, rows in (dict(sorted(groups.items())) | every).items()
    }


def table(found: Mapping[str, Any]) -> str:
    """The figures in percent, for people."""
    head = [
        "",
        "rows",
        "step: median",
        "p90",
        "bias",
        "left out: median",
        "p90",
        "memory: median",
        "under",
        "regret: mean",
    ]
    head += ["worst", "best in three", "interval holds"]
    return markdown(head, [[name, *_cells(of)] for name, of in found.items()])


def _cells(of: Mapping[str, Any]) -> list[str]:
    step, out = of["step"], of["source_left_out"]["step"]
    memory, ranked, held = of["memory"] or {}, of["regret"] or {}, of["interval"] or {}
    shown = [
        step["median"],
        step["p90"],
        step["bias"],
        out["median"],
        out["p90"],
        memory.get("median"),
        memory.get("under"),
    ]
    shown += [ranked.get("mean"), ranked.get("worst"), ranked.get("top_three"), held.get("held")]
    return [str(step["n"]), *("" if x is None else f"{x * 100:.1f}" for x in shown)]
