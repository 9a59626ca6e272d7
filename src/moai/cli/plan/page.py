"""The chosen plan as one HTML page: a timeline of the step on every stage, and the memory of its devices.

In: a `Chosen`. Out: a file that needs nothing else, and is there whole or not at all.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from html import escape
from pathlib import Path

from moai.cli.plan import figures
from moai.cli.plan.choosing import Chosen
from moai.cli.plan.figures import seconds, size
from moai.cli.plan.schedule import Lane, held, lanes
from moai.plan.plan import Plan
from moai.plan.prediction import Prediction
from moai.plan.search import Candidate
from moai.version import __version__

_WIDTH, _LEFT, _ROW, _GAP, _HEIGHT = 1100, 190, 26, 6, 240
_COLOURS = {
    "forward": "#4c78a8",
    "backward": "#2f9e6e",
    "recompute": "#b8a13a",
    "message": "#c8553d",
    "optimizer": "#7a5195",
}
_WAITING = "#eef0f3"
_SAID = {
    "forward": "forward",
    "backward": "backward",
    "recompute": "computing again",
    "message": "waiting for messages",
    "optimizer": "optimizer",
}
# More micro-batches than make so many blocks cannot be told apart.
_MOST_BLOCKS = 1500
_MOST_ROWS = 64
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2430; background: #fff; max-width: 1200px; margin: 2em auto; }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em } code { font-size: .95em }
table { border-collapse: collapse } th, td { padding: .2em .9em .2em 0; text-align: left }
td.n, th.n { text-align: right }
tr + tr td { border-top: 1px solid #e3e6eb } svg { width: 100%; height: auto } text { font: 12px system-ui, sans-serif }
.key { display: inline-block; width: .8em; height: .8em; margin: 0 .4em 0 1em } .quiet { color: #5c6675 }
"""


# (part of the step's time, bytes), in order
Course = Sequence[tuple[float, float]]


def write(chosen: Chosen, file: Path, course: Course | None = None) -> None:
    """Write the page as `file`. `course`: how much memory a device holds, where that was looked at. Raises OSError."""
    descriptor, temporary = tempfile.mkstemp(dir=file.absolute().parent, suffix=".html")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(page(chosen, course))
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp keeps it from others
        os.replace(temporary, file)
    except BaseException:
        with suppress(OSError):
            os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def page(chosen: Chosen, course: Course | None = None) -> str:
    """The page's text."""
    best, target = chosen.choice.best, chosen.target
    assert best.prediction is not None
    title = f"Plan for {target.name}: {best.plan}"
    return "\n".join(
        (
            f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>',
            f"<style>{_STYLE}</style></head><body>",
            f"<h1>{escape(title)}</h1>",
            f"<p>{escape(_summary(chosen, best.prediction))}</p>",
            *_drawings(best.prediction, best.plan, chosen.choice.budget_bytes, course),
            *_candidates(chosen.choice.candidates, best),
            f'<p class="quiet">MoAI {escape(__version__)}. All figures are predictions.</p></body></html>',
            "",
        )
    )


def _summary(chosen: Chosen, prediction: Prediction) -> str:
    cluster, tokens = chosen.choice.cluster, chosen.choice.tokens
    speed = f", {tokens / prediction.step_s:,.0f} tokens/s" if tokens else ""
    return (
        f"{cluster.n_devices} x {cluster.device.name}. A step takes {seconds(prediction.step_s)}{speed}; a device "
        f"holds {size(prediction.memory.total)} at most, of {size(chosen.choice.budget_bytes)} that a plan may use."
    )


def _drawings(prediction: Prediction, plan: Plan, budget_bytes: int, course: Course | None) -> Iterator[str]:
    shown = min(plan.micro, max(1, _MOST_BLOCKS // len(prediction.stages)))
    drawn = replace(plan, micro=shown)
    rows = lanes(prediction, drawn)
    end = max(lane.spans[-1].end for lane in rows)
    yield "<h2>The step on every device</h2>"
    if shown < plan.micro:
        yield f'<p class="quiet">Drawn with {shown} of its {plan.micro} micro-batches.</p>'
    waiting = f'<span class="key" style="background:{_WAITING}"></span>waiting for other stages'
    yield "<p>" + "".join(_key(kind) for kind in _COLOURS) + (waiting if plan.pp > 1 else "") + "</p>"
    yield _timeline(rows[:_MOST_ROWS], end, plan)
    if len(rows) > _MOST_ROWS:
        yield f'<p class="quiet">The first {_MOST_ROWS} of {len(rows)} stages.</p>'
    yield "<h2>Memory of a device</h2>"
    fullest = max(rows, key=lambda lane: prediction.stages[lane.stage].memory.total)
    curve = held(prediction, fullest) if course is None else [(end * part, level) for part, level in course]
    yield _memory(curve, end, budget_bytes, _devices(fullest.stage, plan))
    parts = prediction.stages[fullest.stage].memory
    sizes = ", ".join(f"{figures.MEMORY[n]} {size(getattr(parts, n))}" for n in figures.MEMORY)
    yield f"<p>At its peak: {escape(sizes)}.</p>"


def _key(kind: str) -> str:
    return f'<span class="key" style="background:{_COLOURS[kind]}"></span>{_SAID[kind]}'


def _devices(stage: int, plan: Plan) -> str:
    each = plan.dp * plan.tp
    first, last = stage * each, (stage + 1) * each - 1
    devices = f"device {first}" if each == 1 else f"devices {first}-{last}"
    return (
        devices if plan.pp == 1 or plan.layers is None else f"{devices}: {_layers(sum(plan.layers[stage :: plan.pp]))}"
    )


def _layers(n: int) -> str:
    return "1 layer" if n == 1 else f"{n} layers"


def _timeline(rows: Sequence[Lane], end: float, plan: Plan) -> str:
    height = len(rows) * (_ROW + _GAP)
    shapes = []
    for at, lane in enumerate(rows):
        y = at * (_ROW + _GAP)
        shapes.append(f'<text x="0" y="{y + 18}">{_devices(lane.stage, plan)}</text>')
        shapes.append(f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH - _LEFT}" height="{_ROW}" fill="{_WAITING}"/>')
        for span in lane.spans:
            x, until = _x(span.begin, end), _x(span.end, end)
            which = "" if span.micro is None else f" of micro-batch {span.micro + 1}"
            tip = f"{_SAID[span.kind]}{which}, {seconds(span.end - span.begin)}"
            shapes.append(
                f'<rect x="{x:.2f}" y="{y}" width="{max(until - x, 0.1):.2f}" height="{_ROW}" '
                f'fill="{_COLOURS[span.kind]}"><title>{tip}</title></rect>'
            )
    return _svg(height, "".join(shapes), end)


def _memory(curve: Sequence[tuple[float, float]], end: float, budget_bytes: int, who: str) -> str:
    top = 1.08 * max(budget_bytes, *(level for _, level in curve))

    def y(nbytes: float) -> float:
        return _HEIGHT * (1 - nbytes / top)

    line = " ".join(f"{_x(at, end):.2f},{y(level):.2f}" for at, level in curve)
    budget = y(budget_bytes)
    return _svg(
        _HEIGHT,
        f'<text x="0" y="{_HEIGHT - 6}">{who}</text>'
        f'<polygon points="{_LEFT},{_HEIGHT} {line} {_x(curve[-1][0], end):.2f},{_HEIGHT}" fill="#4c78a8" '
        f'fill-opacity="0.25"/><polyline points="{line}" fill="none" stroke="#4c78a8" stroke-width="1.5"/>'
        f'<line class="budget" x1="{_LEFT}" x2="{_WIDTH}" y1="{budget:.2f}" y2="{budget:.2f}" stroke="#c8553d" '
        f'stroke-dasharray="6 4"/><text x="0" y="{budget + 4:.2f}">budget {size(budget_bytes)}</text>',
        end,
    )


def _x(at: float, end: float) -> float:
    return _LEFT + (_WIDTH - _LEFT) * at / end


def _svg(height: float, shapes: str, end: float) -> str:
    """The shapes above an axis of time."""
    ticks = "".join(
        f'<text x="{_x(end * k / 4, end):.0f}" y="{height + 18}" text-anchor="{anchor}">{seconds(end * k / 4)}</text>'
        for k, anchor in enumerate(("start", "middle", "middle", "middle", "end"))
    )
    return f'<svg viewBox="0 0 {_WIDTH} {height + 26}" role="img">{shapes}{ticks}</svg>'


def _candidates(candidates: Sequence[Candidate], best: Candidate) -> Iterator[str]:
    yield "<h2>Best plans</h2><table><tr><th>Plan</th><th class=n>Step</th><th class=n>Peak</th><th>Behind by</th></tr>"
    for candidate in [c for c in candidates if c.dropped is None][:20]:
        prediction = candidate.prediction
        assert prediction is not None and best.prediction is not None
        why = "chosen" if candidate is best else figures.behind(prediction, best.prediction)
        peak = size(prediction.memory.total)
        yield (
            f"<tr><td><code>{escape(str(candidate.plan))}</code></td><td class=n>{seconds(prediction.step_s)}</td>"
            f"<td class=n>{peak}</td><td>{escape(why)}</td></tr>"
        )
    yield "</table><h2>Dropped</h2><table><tr><th class=n>Plans</th><th>Why, for example</th><th>Example</th></tr>"
    for reason, count, example in figures.dropped(candidates):
        plan = escape(str(example.plan))
        yield f"<tr><td class=n>{count:,}</td><td>{escape(reason)}</td><td><code>{plan}</code></td></tr>"
    yield "</table>"
