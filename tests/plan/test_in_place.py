"""Times that follow from tasks that were timed in their place, within a model's step."""

import json
from dataclasses import replace

import pytest

from moai.plan import cluster_file
from moai.plan.in_place import timed
from moai.plan.profile import Hardware, Profile, Profiled, Table
from moai.plan.timings import Group
from moai.plan.work import Memory, Task, Work

CLUSTER = cluster_file.load("cpu")
BARE = Profile(
    Hardware("cpu", "A processor", 2, 1, "2.13.0"),
    "2026-01-01",
    1e-6,
    0.5,
    {
        "matmul fp32": Table(((1.0, 1e3),) * 3, tuple(1e-5 * 10.0**i for i in (0, 1, 1, 2, 1, 2, 2, 3))),
        "stream add": Table(((1e3, 1e6),), (1e-5, 1e-2)),
        "all_reduce 2 waited": Table(((1e3, 1e6),), (1e-4, 1e-2)),
    },
)
PRODUCT = Task("matmul", "forward", flops=2.0 * 8 * 16 * 32, bytes=4.0 * 800, m=8, n=16, k=32)
ADD = Task("stream", "forward", bytes=5e3, op="add")
SUM = Task("all_reduce", "forward", message=4e3, axis="tp")
GROUPS = {"tp": Group(2, 1, 2), "dp": Group(1)}


def seconds(profile, *tasks, groups=GROUPS):
    return Profiled(profile, CLUSTER).durations(Work.of(tasks, Memory(), 1.0), groups)


def profile(*tasks):
    """With what these (task, seconds, group) took in their place."""
    return BARE.with_tasks([timed(*task) for task in tasks])


def test_a_task_that_was_timed_takes_what_it_took():
    measured = profile((PRODUCT, 0.25, 1), (ADD, 0.5, 1), (SUM, 0.75, 2))
    assert seconds(measured, ADD, SUM, PRODUCT) == pytest.approx([0.5, 0.75, 0.25])


def test_sizes_that_are_interpolated_are_found_again():
    nearly = PRODUCT._replace(m=8 * (1 + 1e-12), flops=PRODUCT.flops * (1 - 1e-12))
    assert seconds(profile((PRODUCT, 0.25, 1)), nearly) == pytest.approx([0.25])


def test_another_size_differs_from_its_table_as_the_nearest_one_does():
    measured = profile((ADD, 0.5, 1), (ADD._replace(bytes=9e5), 0.1, 1))
    near, far = ADD._replace(bytes=6e3), ADD._replace(bytes=8e5)
    factors = seconds(measured, near, far) / seconds(BARE, near, far)
    expected = [0.5, 0.1] / seconds(BARE, ADD, ADD._replace(bytes=9e5))
    assert factors == pytest.approx(expected)


@pytest.mark.parametrize(
    "other",
    [
        ADD._replace(op="gelu"),
        ADD._replace(precision="bf16"),
        ADD._replace(phase="backward"),
        PRODUCT,
        SUM,
        SUM._replace(until=2),
        SUM._replace(looped=False),
        SUM._replace(kind="all_gather"),
    ],
)
def test_what_is_of_another_kind_is_left_to_its_table(other):
    measured = profile((ADD, 0.5, 1), (SUM, 0.7, 4))
    assert seconds(measured, other) == pytest.approx(seconds(BARE, other))


def test_what_is_computed_again_takes_what_it_took_forward():
    again = ADD._replace(phase="backward", recomputed=True)
    assert seconds(profile((ADD, 0.5, 1)), again) == pytest.approx([0.5])


def test_the_share_of_what_was_timed_is_known():
    measured = Profiled(profile((ADD, 0.3, 1), (PRODUCT, 0.1, 1)), CLUSTER)
    here = Work.of([ADD, PRODUCT], Memory(), 1.0)
    assert measured.timed_share(here, GROUPS) == pytest.approx(1.0)
    other = Work.of([ADD, PRODUCT._replace(m=9, flops=2.0 * 9 * 16 * 32)], Memory(), 1.0)
    assert 0.5 < measured.timed_share(other, GROUPS) < 0.8
    assert Profiled(BARE, CLUSTER).timed_share(here, GROUPS) == 0.0


def test_a_task_that_is_timed_again_takes_the_place_of_the_first():
    found = profile((ADD, 0.5, 1), (SUM, 0.7, 2)).with_tasks([timed(ADD, 0.2, 1)])
    assert [(task.kind, task.seconds) for task in found.tasks] == [("all_reduce", 0.7), ("stream", 0.2)]


def test_timed_tasks_are_kept_as_json():
    measured = profile((ADD, 0.5, 1), (SUM, 0.7, 2))
    assert Profile.from_json(json.loads(json.dumps(measured.to_json()))) == measured


@pytest.mark.parametrize("change", [{"kind": "dance"}, {"op": "x"}, {"m": -1.0}, {"seconds": 0.0}, {"bytes": "many"}])
def test_a_task_that_cannot_be_is_refused(change):
    broken = replace(BARE, tasks=(timed(ADD, 0.5, 1)._replace(**change),))
    with pytest.raises(ValueError):
        Profile.from_json(json.loads(json.dumps(broken.to_json())))


def test_a_message_in_its_place_hides_nothing():
    assert Profiled(BARE, CLUSTER).overlap_slowdown == 0.5
    assert Profiled(profile((SUM, 0.7, 2)), CLUSTER).overlap_slowdown == 1.0
