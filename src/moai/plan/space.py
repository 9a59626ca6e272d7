"""All plans that could be chosen.

In: how many devices there are, the samples of a step and its layers, and what the user allows. Out: plans, by layout
(how many devices share the batch, the matrices and the layers, and how many micro-batches there are), variant (what is
computed again, and what is spread over devices) and the order in which stages work.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from moai.plan.options import Options
from moai.plan.plan import Plan, Precision, Recompute, Schedule

RECOMPUTE: tuple[Recompute, ...] = ("none", "default", "full")
# distribute_param and distribute_low_prec_param; each keeps less on a device, and sends more, than the one before.
SHARDING = ((False, False), (True, False), (True, True))
# The orders in which stages can work, the plainest first, with the stages that a device has.
ORDERS: tuple[tuple[Schedule, int], ...] = (
    *(("1f1b", 1), ("gpipe", 1), ("zero_bubble", 1)),
    *(("interleaved", 2), ("interleaved", 4)),
)


@dataclass(frozen=True, slots=True)
class Allowed:
    """Values that a plan's keys may have; None allows all. `most_stages`: a plan has no more.
    `schedule`, `chunks`: of plans with stages."""

    dp: int | None = None
    tp: int | None = None
    pp: int | None = None
    micro: int | None = None
    recompute: tuple[Recompute, ...] | None = None
    distribute_param: bool | None = None
    distribute_low_prec_param: bool | None = None
    most_stages: int | None = None
    schedule: Schedule | None = None
    chunks: int | None = None

    def allows(self, plan: Plan) -> bool:
        """Whether the user would have it."""
        names = ("dp", "tp", "pp", "micro", "distribute_param", "distribute_low_prec_param")
        wanted = {name: getattr(self, name) for name in names}
        return (
            all(value is None or value == getattr(plan, name) for name, value in wanted.items())
            and (self.recompute is None or plan.recompute in self.recompute)
            and (self.most_stages is None or plan.pp <= self.most_stages)
            and self.allows_order(plan)
        )

    def allows_order(self, plan: Plan) -> bool:
        """Whether the user would have its stages work so, if it has any."""
        if plan.pp == 1:
            return True
        alike = self.chunks is None or (plan.schedule == "interleaved" and plan.chunks == self.chunks)
        return alike and self.schedule in (None, plan.schedule)

    @staticmethod
    def by(options: Options) -> Allowed:
        """What the script's options leave."""
        again = options.activation_recomputation
        stages = 1 if not options.pipeline_parallel else options.num_stages
        return Allowed(
            micro=None if options.num_micro_batches == "auto" else options.num_micro_batches,
            recompute=None if again == "auto" else RECOMPUTE[1:] if again else RECOMPUTE[:1],
            distribute_param=None if options.distribute_parameter == "auto" else options.distribute_parameter,
            most_stages=None if stages == "auto" else stages,
        )


def layouts(
    n_devices: int, batch: int, precision: Precision | None = None, layers: int | None = None
) -> Iterator[Plan]:
    """Every way to lay a step of `batch` samples out on the devices: parts of equal size, or one part a device, and
    with stages as many micro-batches as there are stages or more. A step without samples is done by every device.
    `layers`: how many of them repeat, if that is known: each stage has one or more."""
    if not batch:
        yield Plan(dp=n_devices, precision=precision)
    for pp, tp in product(_divisors(n_devices), repeat=2):
        if n_devices % (pp * tp) or (pp > 1 and layers is not None and pp > layers):
            continue
        dp = n_devices // (pp * tp)
        if batch < dp:
            continue
        counts = _divisors(batch // dp) if batch % dp == 0 else [1]
        for micro in counts:
            if micro >= pp or pp == 1:
                yield Plan(dp=dp, tp=tp, pp=pp, micro=micro, precision=precision)


def variants(layout: Plan) -> Iterator[Plan]:
    """The layout with every kind of sharding and recomputation. What keeps more comes first."""
    for (spread, low), level in product(SHARDING if layout.dp > 1 else SHARDING[:1], RECOMPUTE):
        yield replace(layout, recompute=level, distribute_param=spread, distribute_low_prec_param=low)


def orders(plan: Plan, layers: int | None = None) -> Iterator[Plan]:
    """The plan, whose order is the plainest, with every order that its stages can work in. `layers`: see `layouts`."""
    yield plan
    for schedule, chunks in ORDERS[1:] if plan.pp > 1 else ():
        if layers is None or plan.pp * chunks <= layers:
            yield replace(plan, schedule=schedule, chunks=chunks if chunks > 1 else plan.chunks)


def plans(n_devices: int, batch: int, layers: int | None = None) -> Iterator[Plan]:
    """All of them."""
    every = (plan for layout in layouts(n_devices, batch, None, layers) for plan in variants(layout))
    return (ordered for plan in every for ordered in orders(plan, layers))


def _divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]
