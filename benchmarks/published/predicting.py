"""Predicts cases with given constants.

In: a Case and the constants of its hardware. Out: seconds and bytes of each of its variants, and what is taken of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from benchmarks.published.rows import Case, Variant
from moai.plan.cluster import Cluster, Constant
from moai.plan.cost import predict
from moai.plan.dims import Layout
from moai.plan.plan import Plan
from moai.plan.prediction import Prediction
from moai.plan.timings import Described, Group, laid_out
from moai.plan.transformer import sample
from moai.plan.work import Sample


@dataclass(frozen=True, slots=True)
class Outcome:
    """Seconds and bytes taken for a case, and the least and the most seconds that its variants take."""

    step_s: float
    memory_bytes: float
    low_s: float
    high_s: float


# Of memory that the allocator reserved: what it holds beyond what is used, in pieces that nothing fits into.
_RESERVED = 1.05


# How much more than there is may be predicted for what was run after all.
_DOUBT = 0.15


class Predictor:
    """Keeps the work of each variant of a case: only times change with constants."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self._samples: list[Sample] = [sample(case.model, v.layout, case.stack) for v in case.variants]
        self._groups = [_groups(v.layout, case.cluster) for v in case.variants]
        self._fitting: list[int] | None = None

    def outcome(self, constants: Mapping[str, Constant]) -> Outcome:
        timings = Described(replace(self.case.cluster, constants=constants))
        found = [self._predict(i, timings) for i in self.chosen]
        best = min(found, key=lambda p: p.step_s)
        times = [p.step_s for p in found]
        reserved = _RESERVED if self.case.memory_metric == "reserved" else 1.0
        return Outcome(best.step_s, best.memory.total * reserved, min(times), max(times))

    @property
    def chosen(self) -> list[int]:
        """Who publishes a speed has chosen well what is not stated: of what fits into memory, the fastest is taken."""
        if self._fitting is None:
            timings = Described(self.case.cluster)
            budget = self.case.cluster.device.memory_bytes * (1 + _DOUBT)
            needed = [self._predict(i, timings).memory.total for i in range(len(self._samples))]
            fitting = [i for i, n in enumerate(needed) if n <= budget]
            self._fitting = fitting or [min(range(len(needed)), key=needed.__getitem__)]
        return self._fitting

    def _predict(self, i: int, timings: Described) -> Prediction:
        variant = self.case.variants[i]
        dealt = _dealt(self.case.model.layers, variant)
        return predict(
            self._samples[i],
            _plan(variant.layout),
            timings,
            self._groups[i],
            interleave=variant.interleave,
            dealt=dealt,
        )


def _plan(layout: Layout) -> Plan:
    return Plan(dp=layout.dp, tp=layout.tp, pp=layout.pp, micro=layout.micro)


def _dealt(layers: int, variant: Variant) -> Sequence[int] | None:
    """Frameworks deal layers evenly, where they can."""
    stages = variant.layout.pp
    return [layers // stages] * stages if layers % stages == 0 else None


def _groups(layout: Layout, cluster: Cluster) -> dict[str, Group]:
    """Devices of tp are the nearest, then those of a sequence; both share the batch with dp in what is sharded."""
    found = laid_out([("tp", layout.tp), ("cp", layout.cp), ("dp", layout.dp), ("pp", layout.pp)], cluster)
    found["dp"] = laid_out([("tp", layout.tp), ("dp", layout.cp * layout.dp)], cluster)["dp"]
    return found
