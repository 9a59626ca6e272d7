"""The plan of a process, chosen when its first training step is known.

In: the step's graph, and how its inputs lie. Out: the plan and the program, with the lines of the log that say how they
came about; or an error that says why there is none.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moai.graph.placement import Placement
from moai.graph.step_graph import StepGraph
from moai.lower import lower_cached
from moai.lower.inputs import batch_sizes, global_batch
from moai.lower.program import Program
from moai.plan.cluster import Cluster
from moai.plan.errors import PlanError
from moai.plan.family import Observed
from moai.plan.plan import Plan, Precision
from moai.plan.search import Choice, NoPlan, Step, search
from moai.plan.space import Allowed, plans
from moai.planning import problem, remembered
from moai.planning.budget import budget
from moai.planning.detailed_log import report
from moai.planning.remembered import Remembered
from moai.platform import clusters
from moai.platform.flavors import Flavor
from moai.platform.progress import Waiting

logger = logging.getLogger("moai")

# What the original writes its choice to, in the working folder.
_DUMP = Path("advanced_parallelization_selected_config.dump")
# So many of the best plans are tried, should the first ones need more memory than predicted.
_TRIED = 8

_ADVICE = (
    "Choose a larger flavor with moreh-switch-model (`moai plan` says which is the smallest that would do), use a "
    "smaller batch, or restrict the plan less"
)

Lowered = Callable[[Plan], Program]


@dataclass(frozen=True, slots=True)
class Planned:
    """`program` runs the step under `plan`; `line`: how the log and the list of jobs show it."""

    plan: Plan
    program: Program
    line: str


class Planner:
    """For an accelerator of `flavor`. `allowed`: by the script; `precision`: of matrix products.

    Raises AcceleratorError where the hardware is not known.
    """

    def __init__(self, flavor: Flavor, allowed: Allowed, precision: Precision | None) -> None:
        self._cluster: Cluster = clusters.of_devices(flavor.devices)
        self._profile = problem.profile_of(flavor.devices)
        self._memory_bytes = min(device.memory_bytes for device in flavor.devices)
        self._budget = budget(self._memory_bytes)
        self._allowed = allowed
        self._base = Plan(precision=precision)

    def choose(self, graph: StepGraph, given: Sequence[Placement | None], taken: int) -> Planned:
        """`taken`: bytes of a device that hold other things than the step's inputs. Raises NoPlan."""
        allowed, usable = self._allowed, self._budget - taken
        sizes = batch_sizes(graph)
        if len(sizes) > 1:
            logger.warning("Various batch size detected : %s", ", ".join(map(str, sizes)))
            allowed = replace(allowed, most_stages=1)
        begin = time.monotonic()
        name = remembered.key(graph, self._base, given, self._cluster, self._profile, allowed, usable)
        known = remembered.find(name)
        if known is not None:
            planned = self._known(graph, given, known, time.monotonic() - begin)
        else:
            step = problem.step(graph, given)
            choice, numbers = self._search(step, allowed, usable)
            self._tell_share(step, choice)
            planned = self._first_that_fits(choice, taken, lambda plan: lower_cached(graph, plan, given))
            remembered.keep(name, _memory_of(choice, planned.plan, numbers))
        logger.info("Configuration for parallelism is selected.")
        logger.info(planned.line)
        _dump(planned.line)
        logger.info("train: %s", str(graph.trains).lower())
        return planned

    def _known(self, graph: StepGraph, given: Sequence[Placement | None], known: Remembered, seconds: float) -> Planned:
        logger.info("The number of candidates is %d.", known.candidates)
        logger.info("The number of possible candidates is %d.", known.possible)
        logger.info("This step was planned before on this hardware: its plan was found in %.0f [ms].", seconds * 1e3)
        line = known.plan.line(global_batch(graph, given))
        return Planned(known.plan, lower_cached(graph, known.plan, given), line)

    def _search(self, step: Step, allowed: Allowed, usable: int) -> tuple[Choice, tuple[int, int]]:
        """The choice, with the numbers of candidates and of possible ones."""
        compiling = _Stopwatch(step)
        number = sum(map(allowed.allows, plans(self._cluster.n_devices, step.batch, step.layers)))
        logger.info("The number of candidates is %d.", number)
        logger.info("Parallel Graph Compile start...")
        begin = time.monotonic()
        with Waiting("Choosing a plan") as waiting:
            try:
                choice = search(
                    compiling.step,
                    self._cluster,
                    problem.timings(self._cluster, self._profile),
                    usable,
                    allowed,
                    self._base,
                    lambda *_: waiting.advance(),
                )
            except NoPlan as error:
                report(error.candidates, step.batch)
                raise NoPlan(f"{error.reason}. {_ADVICE}", error.candidates) from None
        seconds = time.monotonic() - begin
        possible = sum(c.dropped is None or c.dropped.startswith("slower") for c in choice.candidates)
        logger.info("Elapsed Time to compile all candidates = %.0f [ms]", compiling.seconds * 1e3)
        logger.info("Parallel Graph Compile finished.")
        logger.info("The number of possible candidates is %d.", possible)
        logger.info("SelectBestGraphFromCandidates start...")
        logger.info(
            "Elapsed Time to compute cost for survived candidates = %.0f [ms]", (seconds - compiling.seconds) * 1e3
        )
        logger.info("SelectBestGraphFromCandidates finished.")
        report(choice.candidates, step.batch)
        return choice, (number, possible)

    def _tell_share(self, step: Step, choice: Choice) -> None:
        timings = problem.timings(self._cluster, self._profile)
        share = problem.timed_share(step, choice.best.plan, timings, self._cluster)
        if share:
            logger.info("Of the predicted time, %.0f %% was measured in layers of this model.", share * 100)

    def _first_that_fits(self, choice: Choice, taken: int, lowered: Lowered) -> Planned:
        """The best plan whose program, now that all layers are lowered, fits beside the `taken` bytes."""
        others = [c.plan for c in choice.candidates if c.dropped is None and c is not choice.best]
        for plan in [choice.best.plan, *others[:_TRIED]]:
            try:
                program = lowered(plan)
            except PlanError:
                continue
            if program.peak_bytes + taken <= self._memory_bytes:
                return Planned(plan, program, plan.line(choice.batch))
        raise NoPlan(f"No plan fits: those that nearly do need more when all is counted. {_ADVICE}", choice.candidates)


def _memory_of(choice: Choice, plan: Plan, numbers: tuple[int, int]) -> Remembered:
    """`numbers`: of candidates, and of possible ones."""
    predicted = next(c.prediction for c in choice.candidates if c.plan == plan)
    assert predicted is not None
    return Remembered(plan, *numbers, step_s=predicted.step_s, peak_bytes=int(predicted.memory.total))


class _Stopwatch:
    """Measures how long observing takes."""

    def __init__(self, step: Step) -> None:
        self.seconds = 0.0
        self.step = replace(step, observe=lambda plan: self._timed(step, plan))

    def _timed(self, step: Step, plan: Plan) -> Observed:
        begin = time.monotonic()
        try:
            return step.observe(plan)
        finally:
            self.seconds += time.monotonic() - begin


def _dump(line: str) -> None:
    """What was chosen, as the original leaves it in the working folder."""
    try:
        temporary = _DUMP.with_name(f".{_DUMP.name}.{os.getpid()}")
        temporary.write_text(line + "\n", encoding="utf-8")
        os.replace(temporary, _DUMP)
    except OSError as error:
        logger.debug("%s cannot be written: %s", _DUMP, error)
