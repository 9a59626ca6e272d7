"""A step's time and memory from its tasks: lanes, host, micro-batches, pipeline stages."""

from dataclasses import dataclass, fields, replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.plan.cost import predict
from moai.plan.plan import Plan
from moai.plan.prediction import Parts
from moai.plan.timings import Group
from moai.plan.work import KINDS, MESSAGES, Memory, Sample, Task, Work


@dataclass(frozen=True)
class Told:
    """A task takes as many seconds as its bytes say, a message as many as its message says."""

    host_s_per_launch: float = 0.0
    overlap_slowdown: float = 0.0

    def durations(self, work, groups):
        return np.where(work.kind < KINDS.index(MESSAGES[0]), work.bytes, work.message)


def computes(seconds, phase="forward", **more):
    return Task("stream", phase, bytes=seconds, **more)


def sends(seconds, until=1, phase="backward", **more):
    return Task("all_reduce", phase, message=seconds, until=until, launches=0, **more)


def whole(*tasks, memory=None):
    """A model without repeated layers."""
    work = Work.of(tasks, memory or Memory(), 1)
    return Sample(work, work, 0, 0)


def layered(n_layers, layer, first=(), behind=(), memory=None, handed=0.0):
    """A model of `n_layers` layers, known by one and two of them."""
    works = [Work.of([*first, *list(layer) * n, *behind], (memory or Memory()) * n, 1) for n in (1, 2)]
    return Sample(*works, layers=1, deeper=n_layers - 1, handed=handed)


def step(sample, plan=None, timings=None, **more):
    return predict(sample, plan or Plan(), timings or Told(), {"pp": Group(2)}, **more)


def test_tasks_are_done_one_after_another():
    found = step(whole(computes(1.0), computes(2.0, "backward"), computes(4.0, "optimizer", looped=False)))
    assert found.step_s == 7.0
    assert (found.parts.forward, found.parts.backward, found.parts.optimizer) == (1.0, 2.0, 4.0)


def test_what_is_computed_again_has_a_part_of_its_own():
    parts = step(whole(computes(1.0), computes(1.0, "backward", recomputed=True), computes(2.0, "backward"))).parts
    assert (parts.forward, parts.recompute, parts.backward) == (1.0, 1.0, 2.0)


def test_computing_waits_for_a_message_whose_result_is_needed_at_once():
    found = step(whole(computes(1.0), sends(2.0, axis="tp"), computes(1.0)))
    assert (found.step_s, found.parts.tp_exposed) == (4.0, 2.0)


def test_a_message_beside_computing_is_exposed_by_what_is_longer():
    found = step(whole(sends(3.0, until=2), computes(2.0), computes(1.0)))
    assert (found.step_s, found.parts.dp_exposed) == (4.0, 1.0)


def test_messages_of_an_axis_are_sent_one_after_another():
    found = step(whole(sends(2.0, until=3), sends(2.0, until=2), computes(1.0), computes(1.0)))
    assert found.step_s == 5.0


def test_computing_loses_a_share_of_what_it_overlaps():
    found = step(whole(sends(2.0, until=2), computes(2.0), computes(1.0)), timings=Told(overlap_slowdown=0.5))
    assert (found.step_s, found.parts.slowdown) == (4.0, 1.0)


def test_a_message_that_nothing_waits_for_ends_with_the_step():
    assert step(whole(computes(1.0), sends(2.0, until=1000))).step_s == 3.0


def test_neither_host_nor_device_hides_the_other_fully():
    calls = whole(computes(1.0, launches=1000))
    assert step(calls, timings=Told(host_s_per_launch=1e-3)).step_s == pytest.approx(2**0.25)
    assert step(calls, timings=Told(host_s_per_launch=1e-2)).step_s == pytest.approx(10.0, rel=1e-3)
    assert step(calls, timings=Told(host_s_per_launch=1e-4)).parts.host == pytest.approx(0.0, abs=1e-4)


def test_what_is_looped_is_done_in_each_micro_batch():
    sample = whole(
        computes(1.0), computes(2.0, "backward"), sends(4.0, looped=False), computes(8.0, "optimizer", looped=False)
    )
    assert step(sample, Plan(micro=4)).step_s == 4 * 3.0 + 4.0 + 8.0


def test_gradients_are_summed_beside_the_last_micro_batch_only():
    sample = whole(sends(3.0, until=2, looped=False), computes(2.0, "backward"), computes(1.0, "backward"))
    assert step(sample, Plan(micro=4)).step_s == 4 * 3.0 + 1.0


def test_one_micro_batch_is_no_loop():
    tasks = [computes(1.0), sends(1.5, until=2), computes(1.0, "backward"), computes(1.0, "optimizer")]
    looped = [t._replace(looped=t.phase != "optimizer") for t in tasks]
    assert step(whole(*tasks)) == step(whole(*looped))


def test_layers_beyond_the_known_ones_take_what_one_more_takes():
    assert step(layered(10, [computes(1.0)], [computes(0.5, first=True)], [computes(0.25)])).step_s == 10.75


@pytest.mark.parametrize(("stages", "micro", "chunks"), [(2, 4, 1), (4, 8, 1), (4, 8, 2), (8, 8, 2), (4, 1, 1)])
def test_equal_stages_have_the_bubble_of_1f1b_and_of_its_interleaved_form(stages, micro, chunks):
    sample = layered(16, [computes(1.0), computes(2.0, "backward")])
    found = step(sample, Plan(pp=stages, micro=micro), interleave=chunks)
    a_stage = 3.0 * 16 / stages
    assert found.parts.bubble == pytest.approx((stages - 1) * a_stage / chunks)
    assert found.step_s == pytest.approx(micro * a_stage + (stages - 1) * a_stage / chunks)


def test_of_uneven_stages_the_slowest_sets_the_pace():
    sample = layered(4, [computes(1.0)], behind=[computes(3.0)])
    found = step(sample, Plan(pp=2, micro=10), dealt=[2, 2])
    assert found.step_s == 10 * 5.0 + 2.0


def test_layers_are_dealt_so_that_the_slowest_stage_is_as_fast_as_can_be():
    sample = layered(10, [computes(1.0)], [computes(1.0, first=True)], [computes(3.0)])
    assert [s.layers for s in step(sample, Plan(pp=2, micro=2)).stages] == [6, 4]


def test_what_a_stage_does_once_is_done_by_the_slowest():
    sample = layered(4, [computes(1.0), computes(1.0, "optimizer", looped=False)])
    assert step(sample, Plan(pp=2, micro=3)).step_s == 3 * 2.0 + 2.0 + 2.0


def test_a_stage_waits_for_its_neighbours_messages():
    class Slow(Told):
        def durations(self, work, groups):
            return np.where(work.kind == KINDS.index("send"), 0.5, work.bytes)

    found = step(layered(4, [computes(1.0)], handed=1.0), Plan(pp=2, micro=3), Slow())
    assert (found.parts.pp_exposed, found.step_s) == (3 * 1.0, 3 * 3.0 + 3.0)


def test_too_few_layers_for_the_stages_are_refused():
    with pytest.raises(ValueError, match="3 repeating layers cannot be dealt to 4 pipeline stages"):
        step(layered(3, [computes(1.0)]), Plan(pp=4))


def test_a_deal_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="does not deal 4 layers to 2 stages"):
        step(layered(4, [computes(1.0)]), Plan(pp=2), dealt=[1, 1])


def test_the_first_stage_holds_the_activations_of_as_many_micro_batches_as_there_are_stages():
    sample = layered(8, [computes(1.0)], memory=Memory(parameters=1.0, activations=10.0))
    held = [s.memory.activations for s in step(sample, Plan(pp=4, micro=16)).stages]
    assert held == [2 * 10.0 * n for n in (4, 3, 2, 1)]
    assert step(sample, Plan(pp=4, micro=2)).memory.activations == 2 * 10.0 * 2


def test_interleaved_stages_hold_more():
    sample = layered(8, [computes(1.0)], memory=Memory(activations=10.0))
    plan = Plan(pp=4, micro=16)
    assert step(sample, plan, interleave=2).memory.total > step(sample, plan).memory.total


def test_where_the_ends_memory_is_not_known_apart_both_ends_are_taken_to_hold_it():
    layer, ends = Memory(parameters=1.0), Memory(parameters=5.0)
    works = [Work.of([computes(1.0)] * n, layer * n + ends, 1) for n in (1, 2)]
    sample = Sample(*works, layers=1, deeper=3)
    plan = Plan(pp=2, micro=2)
    assert [s.memory.parameters for s in step(sample, plan).stages] == [7.0, 7.0]
    known = replace(sample, before=Memory(parameters=2.0))
    assert [s.memory.parameters for s in step(known, plan).stages] == [4.0, 5.0]


tasks = st.builds(
    Task,
    st.sampled_from(KINDS),
    st.sampled_from(["forward", "backward", "optimizer"]),
    bytes=st.floats(0, 10),
    message=st.floats(0, 10),
    launches=st.integers(0, 100),
    axis=st.sampled_from(["dp", "tp"]),
    until=st.integers(1, 12),
    looped=st.booleans(),
    recomputed=st.booleans(),
)


@given(st.lists(tasks, min_size=1, max_size=12), st.integers(1, 5), st.floats(0, 1), st.sampled_from([0.0, 1e-3]))
def test_parts_sum_to_the_step_and_no_message_costs_more_than_itself(listed, micro, slowdown, host):
    found = step(whole(*listed), Plan(micro=micro), Told(host, slowdown))
    parts = [getattr(found.parts, f.name) for f in fields(Parts)]
    assert found.step_s == pytest.approx(sum(parts))
    seconds = [t.message * (1 + slowdown) if t.kind in MESSAGES else t.bytes for t in listed]
    calls = sum(t.launches for t in listed) * host
    assert found.step_s <= (sum(seconds) + calls) * micro * (1 + 1e-9) + 1e-9
    computing = sum(t.bytes for t in listed if t.kind not in MESSAGES)
    assert found.step_s >= computing * (1 - 1e-9) - 1e-9


@given(st.lists(tasks, min_size=1, max_size=8), st.integers(2, 12), st.sampled_from([1, 2, 4]), st.integers(1, 6))
def test_stages_share_all_layers_and_none_is_faster_than_its_work(layer, deeper, stages, micro):
    sample = layered(deeper + 4, layer)
    found = step(sample, Plan(pp=stages, micro=micro))
    assert sum(s.layers for s in found.stages) == deeper + 4
    assert found.step_s >= max(micro * (s.forward_s + s.backward_s) for s in found.stages) * (1 - 1e-9) - 1e-9
