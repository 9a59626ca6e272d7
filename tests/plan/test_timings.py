"""Seconds of tasks from a cluster's description: where an axis' devices lie, rooflines, and collectives."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.plan.cluster import Cluster, Constant, DeviceModel, Link
from moai.plan.plan import Plan
from moai.plan.timings import Described, Group, groups
from moai.plan.work import KINDS, MESSAGES, Memory, Task, Work

EXACT = {
    name: Constant(value, "assumed", value, value)
    for name, value in {"matmul": 1.0, "attention": 1.0, "stream": 1.0, "inside": 1.0, "between": 1.0}.items()
} | {n: Constant(0.0, "assumed", 0.0, 0.0) for n in ("wave", "ramp", "kernel_s", "message_s", "launch_s")}
DEVICE = DeviceModel("device", "cuda", 80 << 30, 1e12, {"fp32": 1e13, "bf16": 1e14})
CLUSTER = Cluster("cluster", DEVICE, 2, 8, Link(1e11, 0.0), Link(1e10, 0.0), EXACT)


def seconds(task, group=None, cluster=CLUSTER):
    return Described(cluster).durations(Work.of([task], Memory(), 1), {task.axis: group or Group(1)})[0]


def test_devices_of_tp_lie_side_by_side_then_those_of_dp_then_the_stages():
    found = groups(Plan(dp=2, tp=4, pp=2), CLUSTER)
    assert found["tp"] == Group(size=4, nodes=1, per_node=4, sharing=1)
    assert found["dp"] == Group(size=2, nodes=1, per_node=2, sharing=1)
    assert found["pp"] == Group(size=2, nodes=2, per_node=1, sharing=8)


def test_devices_that_share_states_are_nearer_than_those_that_copy_them():
    found = groups(Plan(dp=16, distribute_param=True, shard=8), CLUSTER)
    assert found["dp_shard"] == Group(8, nodes=1, per_node=8, sharing=1)
    assert found["dp_replicate"] == Group(2, nodes=2, per_node=1, sharing=8)
    assert found["dp"] == Group(16, nodes=2, per_node=8, sharing=1)


def test_a_product_takes_the_longer_of_computing_and_reading():
    computed = Task("matmul", "forward", "bf16", flops=1e14, bytes=1e11, m=1e4, n=1e4, k=5e5)
    assert seconds(computed) == pytest.approx(1.0)
    assert seconds(computed._replace(bytes=3e12)) == pytest.approx(3.0)


def test_small_and_shallow_products_reach_a_smaller_share_of_the_peak():
    lossy = replace(CLUSTER, constants=EXACT | {n: Constant(64.0, "assumed", 0, 100) for n in ("wave", "ramp")})
    wide = Task("matmul", "forward", "bf16", flops=2.0 * 64**3, m=64, n=64, k=64)
    assert seconds(wide, cluster=lossy) == pytest.approx(seconds(wide) * (1 + 64 / 64) * (1 + 64 / 64**2))


def test_a_precision_without_a_rate_has_that_of_the_next_wider():
    task = Task("stream", "forward", flops=1e12)
    assert seconds(task._replace(precision="fp8")) == seconds(task._replace(precision="bf16"))
    assert seconds(task._replace(precision="fp64")) == seconds(task._replace(precision="fp32"))


@pytest.mark.parametrize(("kind", "volume"), [("all_gather", 7 / 8), ("reduce_scatter", 7 / 8), ("all_to_all", 7 / 8)])
def test_each_device_sends_all_but_its_own_share(kind, volume):
    assert seconds(Task(kind, "forward", message=1e11), Group(8, 1, 8)) == pytest.approx(volume)


def test_a_sum_is_scattered_and_gathered():
    assert seconds(Task("all_reduce", "forward", message=1e11), Group(8, 1, 8)) == pytest.approx(2 * 7 / 8)


def test_a_ring_over_nodes_has_the_network_of_all_its_devices_there():
    sent = Task("all_gather", "forward", message=1e11)
    assert seconds(sent, Group(16, 2, 8)) == pytest.approx(15 / 16 * 1e11 / 8e10)
    assert seconds(sent, Group(2, 2, 1, sharing=8)) == pytest.approx(1 / 2 * 1e11 / 1e10)


def test_a_small_sum_climbs_a_tree_where_a_ring_has_many_rounds():
    slow = replace(CLUSTER, inside=Link(1e11, 1e-3))
    assert seconds(Task("all_reduce", "forward", message=1.0), Group(8, 1, 8), slow) == pytest.approx(2 * 3 * 1e-3)


def test_a_group_of_one_sends_nothing():
    assert seconds(Task("all_reduce", "forward", message=1e11), Group(1)) == 0.0


sizes = st.floats(0, 1e12)


@given(st.sampled_from(KINDS), sizes, sizes, sizes, st.integers(1, 64), st.floats(1.01, 100))
def test_more_bandwidth_and_a_higher_peak_are_never_slower(kind, flops, moved, message, size, faster):
    task = Task(kind, "forward", "bf16", flops, moved, 64, 64, 64, message=message)
    group = Group(size, -(-size // 8), min(size, 8))
    better = replace(
        CLUSTER,
        device=replace(DEVICE, peak={p: r * faster for p, r in DEVICE.peak.items()}, memory_bandwidth=1e12 * faster),
        inside=Link(CLUSTER.inside.bandwidth * faster, 0.0),
        between=Link(CLUSTER.between.bandwidth * faster, 0.0),
    )
    assert seconds(task, group, better) <= seconds(task, group) * (1 + 1e-9)


@given(st.sampled_from(MESSAGES), sizes, st.integers(1, 500))
def test_messages_take_finite_times_that_grow_with_their_bytes(kind, message, size):
    group = Group(size, -(-size // 8), min(size, 8))
    task = Task(kind, "forward", message=message)
    few, many = seconds(task, group), seconds(task._replace(message=2 * message), group)
    assert np.isfinite([few, many]).all() and 0.0 <= few <= many
