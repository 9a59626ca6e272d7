"""What there is to choose from for a step, and what is known of the hardware.

In: a captured step, devices or a description of them, what the script and the environment allow. Out: the arguments of
`plan.search`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cache

from moai.graph.placement import Placement
from moai.graph.step_graph import StepGraph, tokens
from moai.lower.inputs import global_batch
from moai.lower.sampling import layers, observe
from moai.plan.cluster import Cluster
from moai.plan.family import Observe, Observed
from moai.plan.plan import Plan
from moai.plan.profile import Profile, Profiled
from moai.plan.search import Step
from moai.plan.timings import Described, Timings, groups
from moai.plan.work import Held, Stages
from moai.planning.observers import two_observers
from moai.platform.device import Device
from moai.profiling import store

# Numbers that AdamW keeps for each of a parameter.
_STATES_OF_ADAMW = 2


def profile_of(devices: Sequence[Device]) -> Profile | None:
    """What was measured on `devices`, if they are at hand and have been."""
    return store.find(devices) if devices else None


def timings(cluster: Cluster, profile: Profile | None) -> Timings:
    """What was measured, or else what is written of the hardware."""
    return Described(cluster) if profile is None else Profiled(profile, cluster)


def timed_share(step: Step, plan: Plan, timings: Timings, cluster: Cluster) -> float:
    """Of the time of the step's layers under `plan`, what was timed in layers of this very model, from 0 to 1; 0 for
    less than half: some tasks of every model are those of another one."""
    if not isinstance(timings, Profiled) or not timings.has_tasks:
        return 0.0
    found = step.observe(plan)
    work = found.deeper.work if isinstance(found, Stages) else found.more
    share = timings.timed_share(work, groups(plan, cluster))
    return share if share > 0.5 else 0.0


def step(graph: StepGraph, given: Sequence[Placement | None]) -> Step:
    """The step to plan for. What is observed of it is observed once, whatever is asked."""
    return Step(cache(_observing(graph, given)), global_batch(graph, given), tokens(graph), layers(graph))


@contextmanager
def step_for_two(graph: StepGraph) -> Iterator[Step]:
    """The same of a step that nothing is on the devices for, with a second process that observes."""
    given = [None] * len(graph.inputs)
    with two_observers(_observing(graph, given)) as (observe, expect):
        yield Step(cache(observe), global_batch(graph, given), tokens(graph), layers(graph), expect)


def _observing(graph: StepGraph, given: Sequence[Placement | None]) -> Observe:
    find: Observe = lambda plan: observe(graph, plan, given)  # noqa: E731
    return find if graph.trains else lambda plan: _with_states(find(plan))


def _with_states(found: Observed) -> Observed:
    """For a step whose optimizer comes in another graph: it is taken for AdamW."""

    def more(held: Held) -> Held:
        states = _STATES_OF_ADAMW * held.parameters
        return replace(held, total=held.total + states, states=held.states + states)

    if isinstance(found, Stages):
        each = (found.first, found.middle, found.deeper, found.last)
        first, middle, deeper, last = (replace(stage, held=more(stage.held)) for stage in each)
        return replace(found, first=first, middle=middle, deeper=deeper, last=last)
    return replace(found, held=more(found.held), held_more=more(found.held_more))
