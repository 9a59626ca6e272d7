"""What `moai plan` prints for people, drawn by Rich, and what it prints for programs.

In: a `Chosen`. Out: something that `reports.show` prints; a dictionary for `json.dumps`.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from moai.cli import reports
from moai.cli.plan import figures
from moai.cli.plan.choosing import Chosen, ratio, timings
from moai.cli.plan.figures import seconds, size
from moai.graph.step_graph import StepGraph
from moai.plan.prediction import Prediction
from moai.plan.profile import Profiled
from moai.plan.search import Candidate

_SHOWN = 8
_REASONS = 6
_LEAST = 0.0005  # shares of a step that are shown as 0.0 % are not shown


def screen(chosen: Chosen) -> RenderableType:
    """All of it."""
    best = chosen.choice.best
    assert best.prediction is not None
    sections: list[RenderableType] = [_summary(chosen, best.prediction), _times(best.prediction), _memory(chosen)]
    sections.append(_candidates(chosen))
    if any(c.dropped is not None for c in chosen.choice.candidates):
        sections.append(_dropped(chosen))
    if chosen.alternative is not None:
        sections.append(_why(chosen, chosen.alternative))
    return Group(*sections)


def _summary(chosen: Chosen, prediction: Prediction) -> Text:
    choice, cluster = chosen.choice, chosen.choice.cluster
    lines = [
        f"{chosen.target.name}: {cluster.n_devices} x {cluster.device.name}, {size(cluster.device.memory_bytes)} each, "
        f"{cluster.nodes} node(s). A step of {choice.batch:,} samples{_of_tokens(choice.tokens)}.",
        *_weights(chosen.captured.graph),
        "",
        f"Plan       {choice.best.plan}",
        f"           {choice.best.plan.line(choice.batch)}",
        f"Step       {seconds(prediction.step_s)} predicted{_speed(choice.tokens, prediction)}",
        f"Memory     {size(prediction.memory.total)} of {size(choice.budget_bytes)} that a plan may use of a device",
    ]
    if chosen.smallest is not None:
        lines.append(f"Flavor     the smallest that fits is {chosen.smallest}")
    lines.append(f"Search     {seconds(choice.search_s)}, {len(choice.candidates):,} plans")
    if chosen.target.devices:
        lines.append(f"Times      {_times_are(chosen)}")
    if chosen.captured.batches > 1:
        lines.append(
            f"Note       the script adds up the gradients of {chosen.captured.batches} batches before its optimizer's "
            "step: all figures are of the last of them."
        )
    if chosen.captured.options is None:
        lines.append(
            "Note       the script does not ask for this plan yet: torch.moreh.option.enable_advanced_parallelization()"
        )
    return Text("\n".join(lines))


def _times_are(chosen: Chosen) -> str:
    if isinstance(timings(chosen.target), Profiled):
        if chosen.timed_share:
            return f"as measured on these devices, {chosen.timed_share:.0%} of the step in layers of this model"
        return "as measured on these devices: `moai profile` would measure this step's layers, too"
    return "from a description of such devices: `moai profile` would measure them"


def _weights(graph: StepGraph) -> list[str]:
    """How many states the step finds, which at the first one are the weights, and of which type most of them are."""
    found: Counter[torch.dtype] = Counter()
    for input_ in graph.inputs:
        if not input_.batch:
            found[graph.types[input_.id].dtype] += graph.types[input_.id].numel
    if not found:
        return []
    most, _ = found.most_common(1)[0]
    return [f"Weights: {found.total():,} numbers, {str(most).removeprefix('torch.')}."]


def _of_tokens(tokens: int) -> str:
    return f" and {tokens:,} tokens" if tokens else ""


def _speed(tokens: int, prediction: Prediction) -> str:
    return f", {tokens / prediction.step_s:,.0f} tokens/s" if tokens else ""


def _times(prediction: Prediction) -> Table:
    table = reports.empty_table("Part of the step", "Time", "Share", right=(1, 2))
    for name, value in figures.parts(prediction).items():
        if value >= _LEAST * prediction.step_s:
            reports.add_row(table, [figures.PARTS[name], seconds(value), f"{value / prediction.step_s:.1%}"])
    return table


def _memory(chosen: Chosen) -> Table:
    prediction, budget = chosen.choice.best.prediction, chosen.choice.budget_bytes
    assert prediction is not None
    table = reports.empty_table("Memory of a device, at its peak", "Size", "Of the budget", right=(1, 2))
    for name, value in [*figures.memory(prediction).items(), ("all", prediction.memory.total)]:
        reports.add_row(table, [figures.MEMORY.get(name, name), size(value), f"{value / budget:.1%}"])
    return table


def _candidates(chosen: Chosen) -> Table:
    best = chosen.choice.best
    table = reports.empty_table("Best plans", "Step", "Slower", "Peak", "Why it is behind", right=(1, 2, 3))
    for candidate in [c for c in chosen.choice.candidates if c.dropped is None][:_SHOWN]:
        reports.add_row(table, _candidate(candidate, best))
    return table


def _candidate(candidate: Candidate, best: Candidate) -> list[str]:
    prediction = candidate.prediction
    assert prediction is not None and best.prediction is not None
    why = "chosen" if candidate is best else figures.behind(prediction, best.prediction)
    slower = f"{ratio(candidate, best) - 1:+.1%}"
    return [str(candidate.plan), seconds(prediction.step_s), slower, size(prediction.memory.total), why]


def _dropped(chosen: Chosen) -> Table:
    table = reports.empty_table("Dropped", "Why, for example", "Example", right=(0,))
    groups = figures.dropped(chosen.choice.candidates)
    for reason, count, example in groups[:_REASONS]:
        reports.add_row(table, [f"{count:,}", reason, str(example.plan)])
    if len(groups) > _REASONS:
        reports.add_row(table, [f"{sum(count for _, count, _ in groups[_REASONS:]):,}", "other reasons", ""])
    return table


def _why(chosen: Chosen, other: Candidate) -> RenderableType:
    best = chosen.choice.best
    verdict = _verdict(other, best)
    if other.prediction is None or best.prediction is None:
        return Text(verdict)
    table = reports.empty_table("Part", "Chosen", "Asked about", "Difference", right=(1, 2, 3))
    ours, theirs = figures.parts(best.prediction), figures.parts(other.prediction)
    least = _LEAST * best.prediction.step_s
    rows = [(figures.PARTS[n], ours[n], theirs[n]) for n in figures.PARTS if max(ours[n], theirs[n]) >= least]
    for name, mine, its in [*rows, ("step", best.prediction.step_s, other.prediction.step_s)]:
        reports.add_row(table, [name, seconds(mine), seconds(its), _signed(its - mine, seconds)])
    held, holds = figures.memory(best.prediction), figures.memory(other.prediction)
    sizes = [(figures.MEMORY[n], held[n], holds[n]) for n in figures.MEMORY]
    for name, mine, its in [*sizes, ("memory", best.prediction.memory.total, other.prediction.memory.total)]:
        reports.add_row(table, [name, size(mine), size(its), _signed(its - mine, size)])
    return Group(Text(verdict), table)


def _verdict(other: Candidate, best: Candidate) -> str:
    text = f'The best plan with that, "{other.plan}",'
    if other.dropped is not None:
        return f"{text} cannot be taken: {other.dropped.removesuffix('.')}."
    if other.plan == best.plan:
        return f"{text} is the chosen one."
    return f"{text} takes {ratio(other, best):.2f} times as long as the chosen one."


def _signed(value: float, text: Any) -> str:
    return f"{'-' if value < 0 else '+'}{text(abs(value))}" if value else "0"


# ---------------------------------------------------------------- JSON


def as_json(chosen: Chosen) -> dict[str, Any]:
    """Times in seconds, memory in bytes."""
    choice = chosen.choice
    assert choice.best.prediction is not None
    found = {
        "plan": {**asdict(choice.best.plan), "text": str(choice.best.plan)},
        "predicted": _predicted(choice.best.prediction, choice.tokens),
        "candidates": [_candidate_json(c, choice.tokens) for c in choice.candidates],
        "search_s": choice.search_s,
        "target": chosen.target.name,
        "devices": choice.cluster.n_devices,
        "budget_bytes": choice.budget_bytes,
        "batch": choice.batch,
        "tokens": choice.tokens,
        "batches_per_step": chosen.captured.batches,
        "smallest_flavor": chosen.smallest,
    }
    if chosen.alternative is not None:
        found["why"] = _candidate_json(chosen.alternative, choice.tokens)
    return found


def _predicted(prediction: Prediction, tokens: int) -> dict[str, Any]:
    return {
        "step_s": prediction.step_s,
        "tokens_per_s": tokens / prediction.step_s if tokens else None,
        "peak_bytes": round(prediction.memory.total),
        "breakdown": {
            "seconds": figures.parts(prediction),
            "bytes": {name: round(value) for name, value in figures.memory(prediction).items()},
        },
    }


def _candidate_json(candidate: Candidate, tokens: int) -> dict[str, Any]:
    prediction = candidate.prediction
    return {
        "plan": {**asdict(candidate.plan), "text": str(candidate.plan)},
        "predicted": None if prediction is None else _predicted(prediction, tokens),
        "dropped": candidate.dropped,
    }
