"""Timings: how many seconds each task of a Work takes on a device, or on the links between devices.

In: a Cluster, and the sizes of a plan's axes. Out: read by the cost model. `Described` knows the cluster's description
only; where a machine was measured, its profile stands in for it.

A matrix product takes the longer of computing and reading. Computing is the datasheet's rate times the share of it
that large products reach, less what is lost at the edges: the last wave of tiles fills only part of the device, and
each tile has a ramp before and after its inner products. A collective is a ring or a tree, whichever is faster
(Thakur et al., "Optimization of Collective Communication Operations in MPICH", 2005); a ring passes each node's border
once, so that it runs at the rate of the slower of both links.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from moai.plan.cluster import Cluster, Constant, DeviceModel, Link
from moai.plan.plan import Plan
from moai.plan.work import AXES, KINDS, MESSAGES, PRECISIONS, Work

# What is taken where a cluster says nothing else: round figures that hold for accelerators of several makers.
GENERIC: dict[str, Constant] = {
    "matmul": Constant(0.70, "assumed", 0.3, 1.0, "share of the peak that large matrix products reach"),
    "matmul_fp8": Constant(0.68, "assumed", 0.3, 1.0, "the same in fp8, whose peak power allows less often"),
    "matmul_fp4": Constant(0.50, "assumed", 0.2, 1.0, "the same in fp4"),
    "wave": Constant(5e5, "assumed", 0.0, 4e6, "results a matrix product idles for at its last wave of tiles"),
    "ramp": Constant(64.0, "assumed", 0.0, 1024.0, "inner products a tile idles for at its begin and end"),
    "attention": Constant(0.45, "assumed", 0.1, 1.0, "share of the peak that fused attention reaches"),
    "stream": Constant(0.70, "assumed", 0.3, 1.0, "share of the memory's bandwidth that an operator reaches"),
    "kernel_s": Constant(2e-6, "assumed", 0.0, 2e-5, "seconds to begin and end a kernel on the device"),
    "inside": Constant(0.70, "assumed", 0.3, 1.0, "share of the link inside a node that a collective reaches"),
    "between": Constant(0.75, "assumed", 0.3, 1.0, "share of the link between nodes that a collective reaches"),
    "message_s": Constant(1e-5, "assumed", 0.0, 1e-4, "seconds to begin and end a message between devices"),
    "launch_s": Constant(6e-6, "assumed", 0.0, 1e-4, "seconds of the host for one call"),
    "overlap_slowdown": Constant(1 / 3, "assumed", 0.0, 1.0, "of overlapped messages' time, lost by computing"),
}
_MATMULS = {"fp8": "matmul_fp8", "fp4": "matmul_fp4"}
_WIDER = {"fp4": "fp8", "fp8": "bf16", "fp16": "bf16", "bf16": "fp32", "fp32": "fp64"}
_FIRST_MESSAGE = KINDS.index(MESSAGES[0])
_MATMUL, _ATTENTION = KINDS.index("matmul"), KINDS.index("attention")


@dataclass(frozen=True, slots=True)
class Group:
    """The devices of one axis. `nodes`: how many nodes they lie in; `per_node`: how many of them lie in one node;
    `sharing`: groups of the same axis that use a node's network at the same time."""

    size: int
    nodes: int = 1
    per_node: int = 1
    sharing: int = 1


class Timings(Protocol):
    """What the cost model asks. `host_s_per_launch`: seconds of the host for one call. `overlap_slowdown`: the share
    of the messages' time beside which a device computes that its computing becomes longer by."""

    @property
    def host_s_per_launch(self) -> float: ...

    @property
    def overlap_slowdown(self) -> float: ...

    def durations(self, work: Work, groups: Mapping[str, Group]) -> np.ndarray:
        """Seconds of each task on the device or on its links, without the host's."""
        ...


def groups(plan: Plan, cluster: Cluster) -> dict[str, Group]:
    """How a plan's axes lie on a cluster: devices of `tp` side by side, then those of `dp` (of which the ones that
    share states are the nearer), then the stages."""
    inner, outer = (plan.shard, plan.dp // plan.shard) if plan.shard else (plan.dp, 1)
    named = laid_out([("tp", plan.tp), ("dp_shard", inner), ("dp_replicate", outer), ("pp", plan.pp)], cluster)
    named["dp"] = _group(plan.dp, plan.tp, cluster)
    return named


def laid_out(axes: Sequence[tuple[str, int]], cluster: Cluster) -> dict[str, Group]:
    """The group of each axis, where the first axis varies fastest from device to device."""
    found, stride = {}, 1
    for name, size in axes:
        found[name] = _group(size, stride, cluster)
        stride *= size
    return found


def _group(size: int, stride: int, cluster: Cluster) -> Group:
    """`size` devices that lie `stride` devices apart."""
    within = max(1, cluster.devices_per_node // stride)
    per_node = min(size, within)
    nodes = math.ceil(size / per_node)
    sharing = max(1, cluster.devices_per_node // per_node) if nodes > 1 else 1
    return Group(size, nodes, per_node, sharing)


class Described:
    """Timings from a cluster's description. Its constants stand in for the generic ones of the same name; "matmul" may
    be given for one precision ("matmul_fp8")."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._rates = _rates(cluster.device)
        self._reached = np.array([self.constant(_MATMULS.get(p, "matmul")) for p in PRECISIONS])
        self._links = (
            Link(cluster.inside.bandwidth * self.constant("inside"), cluster.inside.latency_s),
            Link(cluster.between.bandwidth * self.constant("between"), cluster.between.latency_s),
        )
        self.host_s_per_launch = self.constant("launch_s")
        self.overlap_slowdown = self.constant("overlap_slowdown")

    def constant(self, name: str) -> float:
        return (self._cluster.constants.get(name) or GENERIC[name]).value

    def durations(self, work: Work, groups: Mapping[str, Group]) -> np.ndarray:
        reading = work.bytes / (self._cluster.device.memory_bandwidth * self.constant("stream"))
        seconds = np.maximum(reading, self._computing(work)) + self.constant("kernel_s") * work.launches
        messages = work.kind >= _FIRST_MESSAGE
        for code in np.unique(work.kind[messages] * len(AXES) + work.axis[messages]):
            kind, axis = divmod(int(code), len(AXES))
            chosen = (work.kind == kind) & (work.axis == axis)
            group = groups.get(AXES[axis], Group(1))
            seconds[chosen] = self.message_s(KINDS[kind], work.message[chosen], group)
        return seconds

    def _computing(self, work: Work) -> np.ndarray:
        """Seconds that the arithmetic takes."""
        seconds = work.flops / self._rates[work.precision]
        seconds[work.kind == _ATTENTION] /= self.constant("attention")
        products = work.kind == _MATMUL
        depth = np.maximum(work.k[products], 1.0)
        results = np.maximum(work.flops[products] / (2.0 * depth), 1.0)
        losses = (1.0 + self.constant("ramp") / depth) * (1.0 + self.constant("wave") / results)
        seconds[products] *= losses / self._reached[work.precision[products]]
        return seconds

    def message_s(self, kind: str, message: np.ndarray, group: Group) -> np.ndarray:
        """Seconds of messages of so many bytes in all, within a group."""
        if group.size == 1:
            return np.zeros_like(message)
        return self.constant("message_s") + self._passing_s(kind, message, group)

    def _passing_s(self, kind: str, message: np.ndarray, group: Group) -> np.ndarray:
        inside, between = self._links
        crossing = group.nodes > 1
        if kind == "send":
            link = between if crossing else inside
            return link.latency_s + message / link.bandwidth
        share = (group.size - 1) / group.size
        if kind == "all_to_all":
            away = (group.size - group.per_node) / group.size
            rounds = (group.per_node - 1) * inside.latency_s + (group.size - group.per_node) * between.latency_s
            return rounds + message * max((share - away) / inside.bandwidth, away / between.bandwidth)
        passes = 2.0 if kind == "all_reduce" else 1.0
        # A group's ring leaves a node by the shares of all its devices there.
        rates = [inside.bandwidth] * (group.per_node > 1) + [between.bandwidth * group.per_node] * crossing
        steps = (group.size - group.nodes) * inside.latency_s + (group.nodes - 1) * between.latency_s
        ring = passes * (steps + share * message / min(rates))
        if kind != "all_reduce":
            return ring
        levels = math.log2(group.per_node) * inside.latency_s + math.log2(group.nodes) * between.latency_s
        return np.minimum(ring, 2.0 * (levels + message / min(rates)))


def _rates(device: DeviceModel) -> np.ndarray:
    """FLOP/s of the device for each precision: of the next wider one, where it has none for a narrow one."""
    return np.array([device.peak[_known(p, device)] for p in PRECISIONS])


def _known(precision: str, device: DeviceModel) -> str:
    """A precision that the device has a rate for. Without a wider one it is taken to be as fast as the widest known:
    a device without fp64 is not asked for it."""
    while precision not in device.peak:
        if precision not in _WIDER:
            return min(device.peak, key=PRECISIONS.index)
        precision = _WIDER[precision]
    return precision
