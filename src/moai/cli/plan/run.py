"""The body of `moai plan`.

In: a `Request` and a step to capture. Out: text on stdout, a page, or both.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from moai.cli import reports
from moai.cli.plan.request import Request, others
from moai.dry.capture import capture_model, capture_script
from moai.dry.messages import ModelStep
from moai.platform.progress import Waiting

if TYPE_CHECKING:
    from moai.dry.session import Captured


def capture(step: ModelStep | Sequence[str], memory_bytes: int, seconds: float, verbose: bool) -> Captured:
    """The step of a script (with its arguments) or of a model; see `dry.capture`. Raises AcceleratorError, in one
    line."""
    with Waiting("Capturing the step"):
        if isinstance(step, ModelStep):
            return capture_model(step, memory_bytes, seconds, verbose)
        return capture_script(step[0], step[1:], memory_bytes, seconds, verbose)


def plan(
    step: ModelStep | Sequence[str],
    request: Request,
    seconds: float,
    in_json: bool,
    verbose: bool,
    environ: Mapping[str, str],
) -> None:
    """Plan for the step of a script (with its arguments) or of a model. Raises AcceleratorError, in one line."""
    cluster = request.target.cluster
    captured = capture(step, cluster.n_devices * cluster.device.memory_bytes, seconds, verbose)
    from moai.cli.plan import page, report  # with torch, which is there by now
    from moai.cli.plan.choosing import choose, course_of

    with Waiting("Searching for the best plan"):
        sizes = others(request.target, environ)
        chosen = choose(captured, request.target, sizes, request.restricted, request.why)
    if request.html is not None:
        with Waiting("Drawing the plan"):
            page.write(chosen, request.html, course_of(chosen))
    if in_json:
        print(json.dumps(report.as_json(chosen), indent=2))
    else:
        reports.show(report.screen(chosen))
