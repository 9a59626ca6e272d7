"""Times that follow from measured ones."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.plan import cluster_file
from moai.plan.profile import Hardware, Profile, Profiled, Table
from moai.plan.timings import Described, Group
from moai.plan.work import OPERATORS, Memory, Task, Work

HARDWARE = Hardware("cpu", "A processor", 4, 1, "2.13.0")
CLUSTER = cluster_file.load("cpu")
SIZES = (100.0, 10_000.0)

increasing = st.lists(st.floats(1.0, 1e9), min_size=1, max_size=4, unique=True).map(lambda x: tuple(sorted(x)))
times = st.floats(1e-7, 10.0)


@st.composite
def grids(draw):
    axes = tuple(draw(increasing) for _ in range(draw(st.integers(1, 3))))
    count = int(np.prod([len(axis) for axis in axes]))
    return Table(axes, tuple(draw(st.lists(times, min_size=count, max_size=count))))


def profile(hardware=HARDWARE, **tables):
    named = {name.replace("__", " "): table for name, table in tables.items()}
    return Profile(hardware, "2026-01-01", 1e-6, 0.5, named)


def seconds(measured, *tasks, groups=None):
    work = Work.of(tasks, Memory(), 1.0)
    return Profiled(measured, CLUSTER).durations(work, groups or {})


def described(*tasks, groups=None):
    return Described(CLUSTER).durations(Work.of(tasks, Memory(), 1.0), groups or {})


@given(grids(), st.data())
def test_a_larger_size_never_takes_less(table, data):
    point = [data.draw(st.floats(0.0, 1e12)) for _ in table.axes]
    dim = data.draw(st.integers(0, len(point) - 1))
    larger = [x * data.draw(st.floats(1.0, 1e3)) if i == dim else x for i, x in enumerate(point)]
    small, large = (float(table.at(*(np.array([x]) for x in p))[0]) for p in (point, larger))
    assert 0.0 < small <= large * (1 + 1e-9)


@given(st.lists(times, min_size=3, max_size=3).map(sorted))
def test_a_measured_size_takes_what_was_measured(seconds):
    table = Table(((1.0, 10.0, 1000.0),), tuple(seconds))
    assert table.at(np.array([1.0, 10.0, 1000.0])) == pytest.approx(seconds)


def test_between_sizes_logarithms_are_interpolated():
    assert Table((SIZES,), (1e-3, 1e-1)).at(np.array([1_000.0])) == pytest.approx([1e-2])


def test_beyond_the_sizes_time_grows_as_they_do_and_below_it_stays():
    assert Table((SIZES,), (1e-3, 1e-1)).at(np.array([1.0, 50_000.0])) == pytest.approx([1e-3, 5e-1])


def test_a_disturbed_time_counts_as_the_next_larger_ones():
    assert Table(((1.0, 2.0, 3.0),), (5.0, 1.0, 2.0)).at(np.array([1.0])) == pytest.approx([1.0])


def test_a_product_takes_no_longer_than_the_smaller_ones_that_it_is_made_of():
    disturbed = Table(((8.0, 32.0), (8.0, 16.0)), (1.0, 2.0, 9.0, 7.0))
    assert disturbed.evened().seconds == (1.0, 2.0, 4.0, 7.0)


@given(grids())
def test_a_profile_is_read_as_it_was_written(table):
    name = ("stream__add", "attention__forward__fp32", "matmul__bf16")[len(table.axes) - 1]
    measured = profile(**{name: table})
    assert Profile.from_json(json.loads(json.dumps(measured.to_json()))) == measured


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@given(st.data())
def test_a_damaged_profile_ends_in_nothing_but_a_value_error(data):
    written = json.loads(json.dumps(profile(stream__add=Table((SIZES,), (1e-3, 1e-1))).to_json()))
    inner = written
    while isinstance(inner[key := data.draw(st.sampled_from(sorted(inner)))], dict) and data.draw(st.booleans()):
        inner = inner[key]
    inner[key] = data.draw(ANYTHING)
    try:
        read = Profile.from_json(written)
    except ValueError:
        return
    assert np.isfinite(seconds(read, Task("stream", "forward", bytes=1e3))).all()


@pytest.mark.parametrize(
    "name", ["stream", "stream add gelu", "all_reduce x waited", "all_reduce 0 waited", "matmul fp32"]
)
def test_a_table_that_nothing_would_ask_for_is_no_profile(name):
    written = profile(stream__add=Table((SIZES,), (1e-3, 1e-1))).to_json()
    with pytest.raises(ValueError, match="no table"):
        Profile.from_json({**written, "tables": {name: written["tables"]["stream add"]}})


def test_what_was_not_measured_is_taken_from_the_description():
    tasks = [
        Task("matmul", "forward", "fp32", 2e9, 1e6, 1e3, 1e3, 1e3),
        Task("attention", "backward", "fp32", 1e9, 1e6),
        Task("stream", "forward", bytes=1e6),
        Task("all_reduce", "backward", message=1e6),
        Task("send", "backward", message=1e6, axis="pp"),
    ]
    groups = {"dp": Group(4, 1, 4), "pp": Group(2, 1, 2)}
    assert seconds(profile(), *tasks, groups=groups) == pytest.approx(described(*tasks, groups=groups))


def test_a_product_takes_what_its_lengths_took_in_its_precision():
    table = Table(((10.0, 100.0),) * 3, tuple(1e-6 * 10 ** (i.bit_count()) for i in range(8)))
    task = Task("matmul", "forward", "fp32", 2 * 100.0**3, 1e4, 100.0, 100.0, 100.0)
    other = task._replace(precision="bf16")
    assert seconds(profile(matmul__fp32=table), task, other) == pytest.approx([1e-3, *described(other)])


def test_several_products_of_one_call_are_called_once():
    table = Table(((10.0, 100.0),) * 3, (1e-5,) * 8)
    eight = Task("matmul", "forward", "fp32", 8 * 2 * 10.0**3, 1e4, 10.0, 10.0, 10.0)
    assert seconds(profile(matmul__fp32=table), eight) == pytest.approx([1e-6 + 8 * 9e-6])


def test_an_operator_takes_what_its_bytes_took_and_an_unknown_one_what_an_addition_did():
    slow, plain = Table((SIZES,), (1e-3, 1e-1)), Table((SIZES,), (1e-4, 1e-2))
    measured = profile(stream__gelu=slow, stream__add=plain)
    tasks = [Task("stream", "forward", bytes=10_000.0, op=op) for op in ("gelu", "tanh", "")]
    assert seconds(measured, *tasks) == pytest.approx([1e-1, 1e-2, 1e-2])


def test_many_calls_take_so_many_times_their_share():
    measured = profile(stream__add=Table((SIZES,), (1e-4, 1e-2)))
    assert seconds(measured, Task("stream", "forward", bytes=1_000.0, launches=10.0)) == pytest.approx([1e-3])


def test_attention_goes_by_its_direction_its_intensity_and_its_bytes():
    forward, backward = (Table(((10.0, 100.0), SIZES), (t, 10 * t, 2 * t, 20 * t)) for t in (1e-6, 3e-6))
    measured = profile(attention__forward__fp32=forward, attention__backward__fp32=backward)
    tasks = [Task("attention", phase, "fp32", 100.0 * 1e4, 1e4) for phase in ("forward", "backward")]
    assert seconds(measured, *tasks) == pytest.approx([2e-5, 6e-5])


def test_a_message_takes_what_it_took_in_a_group_of_its_size():
    waited, started = Table((SIZES,), (1e-3, 1e-2)), Table((SIZES,), (1e-4, 1e-3))
    measured = profile(all_reduce__4__waited=waited, all_reduce__4__started=started)
    task = Task("all_reduce", "backward", message=10_000.0)
    groups = {"dp": Group(4, 1, 4)}
    assert seconds(measured, task, task._replace(until=5), groups=groups) == pytest.approx([1e-2, 1e-3])


def test_a_group_that_was_not_measured_differs_as_the_description_says():
    measured = profile(all_reduce__2__waited=Table((SIZES,), (1e-3, 1e-2)))
    task = Task("all_reduce", "backward", message=10_000.0)
    two, four = ({"dp": Group(n, 1, n)} for n in (2, 4))
    expected = 1e-2 * described(task, groups=four) / described(task, groups=two)
    assert seconds(measured, task, groups=four) == pytest.approx(expected)


def test_messages_between_nodes_and_of_one_device_are_the_descriptions():
    measured = profile(all_reduce__2__waited=Table((SIZES,), (1e-3, 1e-2)))
    task = Task("all_reduce", "backward", message=10_000.0)
    for group in (Group(2, 2, 1), Group(1)):
        assert seconds(measured, task, groups={"dp": group}) == pytest.approx(described(task, groups={"dp": group}))


def test_the_calls_of_a_cpu_worker_are_in_its_operators_and_those_of_a_gpu_are_the_hosts():
    gpu = Hardware("cuda", "A GPU", 4, 1, "2.13.0")
    assert Profiled(profile(), CLUSTER).host_s_per_launch == 0.0
    assert Profiled(profile(gpu), CLUSTER).host_s_per_launch == 1e-6
    assert Profiled(profile(gpu), CLUSTER).overlap_slowdown == 0.5


def test_every_operator_has_a_place_in_a_work():
    work = Work.of([Task("stream", "forward", op=op) for op in OPERATORS], Memory(), 1.0)
    assert [OPERATORS[i] for i in work.op] == list(OPERATORS)
