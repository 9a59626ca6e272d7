"""Which plans are possible on so many devices, and which of them come near one that is not.

In: a plan, a number of devices, and what else is allowed. Out: plans, nearest first. What depends on the graph
(samples, heads, memory) is for the caller's `allowed` to say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product

from moai.plan.plan import Plan, Recompute, Schedule

_LEVELS: tuple[Recompute, ...] = ("none", "default", "full")
_STATES = ((False, False), (True, False), (True, True))  # distribute_param, distribute_low_prec_param
_MOST_PARTS = 512  # every number of micro-batches up to here is considered, and powers of two up to _MOST_POWER
_MOST_POWER = 4096
_LIGHTER_PARTS = (1, 2, 4)  # times as many micro-batches


def obstacle(plan: Plan, n_devices: int) -> str | None:
    """Why `plan` is impossible on `n_devices` devices, whatever it is to run; None if it is not."""
    if plan.n_devices != n_devices:
        counts = [("dp", plan.dp), *((key, size) for key, size in (("tp", plan.tp), ("pp", plan.pp)) if size > 1)]
        sizes = " times ".join(f"{key}={size}" for key, size in counts)
        return f"{sizes} is {_devices(plan.n_devices)}, but the accelerator has {n_devices}"
    if plan.distribute_low_prec_param and not plan.distribute_param:
        return "distribute_low_prec_param=true needs distribute_param=true"
    if plan.shard is not None and not plan.distribute_param:
        return f"shard={plan.shard} needs distribute_param=true: it is how many devices the states are spread over"
    if plan.shard is not None and plan.dp % plan.shard:
        return f"shard={plan.shard} does not divide dp={plan.dp}"
    if plan.schedule == "interleaved" and plan.pp == 1:
        return "schedule=interleaved needs stages (pp=2 or more)"
    if plan.schedule == "interleaved" and plan.chunks == 1:
        return "chunks must be 2 or more: with one stage a device, it is schedule=1f1b"
    if plan.layers is not None and (len(plan.layers) != plan.n_stages or plan.layers.count(0) > 1):
        numbers = "+".join(map(str, plan.layers))
        return f"layers={numbers} must have a number for each of {plan.n_stages} stages, and 0 for one of them at most"
    return None


def nearest(plan: Plan, n_devices: int, allowed: Callable[[Plan], bool] = lambda _: True) -> Plan | None:
    """The plan for `n_devices` devices with the fewest keys changed, and these the least, that is `allowed`.

    `allowed` is asked for plans that are possible on the devices only, nearest first (`plan` itself, if it is). The
    precision is not changed: that would change numbers.
    """
    candidates = sorted(_possible(plan, n_devices), key=lambda candidate: _distance(plan, candidate))
    return next(filter(allowed, candidates), None)


def lighter(plan: Plan) -> Iterator[Plan]:
    """Plans for the same devices that should keep less in a device's memory, the nearest first."""
    present = (plan.distribute_param, plan.distribute_low_prec_param)
    states = [s for s in _STATES if s >= present] if plan.dp > 1 else [present]
    levels = {plan.recompute, _LEVELS[-1]}
    parts = [plan.micro * times for times in _LIGHTER_PARTS]
    candidates = {_with(plan, s, level, n, None) for s, level, n in product(states, levels, parts)}
    yield from sorted(candidates - {plan}, key=lambda candidate: _distance(plan, candidate))


def _possible(plan: Plan, n_devices: int) -> Iterator[Plan]:
    """All plans that `nearest` chooses from."""
    few = range(1, min(plan.micro, _MOST_PARTS) + 1)
    parts = sorted({*few, *(2**i for i in range(_MOST_POWER.bit_length()))})
    stages = _divisors(n_devices) if plan.pp > 1 else [1]
    layouts = [(dp, pp) for dp, pp in product(_divisors(n_devices), stages) if n_devices % (dp * pp) == 0]
    for (dp, pp), states, level, n in product(layouts, _STATES, _LEVELS, parts):
        layout = replace(plan, dp=dp, tp=n_devices // (dp * pp), pp=pp)
        if plan.schedule == "interleaved" and pp > 1:
            layout = replace(layout, chunks=max(plan.chunks, 2))
        else:
            schedule: Schedule = "1f1b" if plan.schedule == "interleaved" else plan.schedule
            layout = replace(layout, schedule=schedule, chunks=Plan().chunks)
        if pp != plan.pp or obstacle(plan, plan.n_devices):
            layout = replace(layout, layers=None)
        shards = [s for s in _divisors(dp) if s < dp] if plan.shard is not None and states[0] else []
        for shard in (None, *shards):
            yield _with(layout, states, level, n, shard)


def _with(plan: Plan, states: tuple[bool, bool], recompute: Recompute, micro: int, shard: int | None) -> Plan:
    return replace(
        plan,
        distribute_param=states[0],
        distribute_low_prec_param=states[1],
        recompute=recompute,
        micro=micro,
        shard=shard,
    )


def _distance(wanted: Plan, other: Plan) -> tuple[object, ...]:
    """How many keys differ, then by how much. Of equals, the one that distributes, then the one with fewer parts."""
    steps = [
        _ratio(wanted.dp, other.dp),
        _ratio(wanted.tp, other.tp),
        _ratio(wanted.pp, other.pp),
        _ratio(wanted.micro, other.micro),
        0 if wanted.shard == other.shard else _ratio(wanted.shard or wanted.dp, other.shard or other.dp),
        abs(_LEVELS.index(wanted.recompute) - _LEVELS.index(other.recompute)),
        wanted.distribute_param != other.distribute_param,
        wanted.distribute_low_prec_param != other.distribute_low_prec_param,
    ]
    return sum(map(bool, steps)), sum(steps), not other.distribute_param, other.tp, other.micro, str(other)


def _ratio(a: int, b: int) -> float:
    """How far apart two sizes are: doublings from one to the other."""
    return abs(math.log2(a / b))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def _devices(n: int) -> str:
    return "1 device" if n == 1 else f"{n} devices"
