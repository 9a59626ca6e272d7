"""A transformer's work from its dims: FLOPs, messages, and bytes of a device."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moai.plan.cost import predict
from moai.plan.dims import Layout, Model, Stack
from moai.plan.plan import Plan
from moai.plan.timings import Group
from moai.plan.transformer import sample
from moai.plan.work import AXES, KINDS, Memory

MODEL = Model(layers=8, hidden=1024, heads=16, kv_heads=4, ffn=4096, vocab=32000, seq=512)
DENSE = Model(layers=12, hidden=2048, heads=16, kv_heads=16, ffn=8192, vocab=50000, seq=1024, gated=False, tied=True)


class Nothing:
    """Every task takes no time."""

    host_s_per_launch = overlap_slowdown = 0.0

    def durations(self, work, groups):
        return np.zeros(len(work.flops))


def column(found, name, kinds=("matmul", "attention"), axis=None):
    """The sum of a column over the whole model's tasks of some kinds."""

    def of(work):
        chosen = np.isin(work.kind, [KINDS.index(k) for k in kinds])
        if axis:
            chosen &= work.axis == AXES.index(axis)
        return getattr(work, name)[chosen].sum()

    return of(found.less) + found.deeper * (of(found.more) - of(found.less))


def memory(layout, stack=None, model=MODEL):
    plan = Plan(dp=layout.dp, tp=layout.tp, pp=layout.pp, micro=layout.micro)
    return predict(sample(model, layout, stack or Stack()), plan, Nothing(), {"pp": Group(layout.pp)}).memory


def test_parameters_are_those_of_known_models():
    llama = Model(32, 4096, 32, 8, 14336, 128256, 8192)
    qwen = Model(64, 5120, 64, 8, 25600, 151936, 4096, head=128)
    assert llama.parameters / 1e9 == pytest.approx(8.03, rel=1e-3)
    assert qwen.parameters / 1e9 == pytest.approx(32.76, rel=1e-3)


def test_a_token_costs_six_flops_a_parameter_and_its_attention():
    found = sample(DENSE, Layout(samples=2), Stack())
    weights = DENSE.parameters - DENSE.layers * 2 * DENSE.hidden  # norms are no products
    attention = (
        7 * DENSE.layers * DENSE.hidden * DENSE.seq
    )  # the masked half is not computed; backward 2.5 times forward
    assert column(found, "flops") == pytest.approx(2 * DENSE.seq * (6 * weights + attention))


def test_full_recomputation_does_the_layers_forward_again():
    once, twice = (column(sample(MODEL, Layout(recompute=level), Stack()), "flops") for level in ("none", "full"))
    head = 6 * MODEL.seq * MODEL.table_parameters
    products = 6 * MODEL.seq * (MODEL.layer_parameters - 2 * MODEL.hidden) * MODEL.layers
    attention = 7 * MODEL.seq**2 * MODEL.hidden * MODEL.layers
    assert once == pytest.approx(products + attention + head)
    assert twice - once == pytest.approx(products / 3 + attention / 3.5)


def test_adapters_leave_out_the_gradients_of_frozen_matrices():
    full = column(sample(MODEL, Layout(), Stack()), "flops", ("matmul",))
    adapted = column(sample(replace(MODEL, adapters="all"), Layout(), Stack()), "flops", ("matmul",))
    assert adapted == pytest.approx(full * 2 / 3)


def test_tp_shares_the_products_and_sends_a_layers_activations_four_times_each_way():
    alone, shared = (sample(MODEL, Layout(tp=tp), Stack(gathers_again=False)) for tp in (1, 4))
    assert column(shared, "flops") == pytest.approx(column(alone, "flops") / 4)
    a_time = 2 * MODEL.seq * MODEL.hidden
    assert column(shared, "message", ("all_gather", "reduce_scatter"), "tp") == 8 * MODEL.layers * a_time
    summed = sample(MODEL, Layout(tp=4), Stack(sequence_parallel=False))
    assert column(summed, "message", ("all_reduce",), "tp") == 4 * MODEL.layers * a_time


@pytest.mark.parametrize(
    ("sharding", "gathered", "scattered", "summed"),
    [("none", 0, 0, 4), ("states", 2, 4, 0), ("gradients", 2, 4, 0), ("full", 4, 4, 0)],
)
def test_what_dp_sends_of_a_parameter(sharding, gathered, scattered, summed):
    found = sample(MODEL, Layout(dp=8, sharding=sharding), Stack(gradient_bytes=4))
    sent = [column(found, "message", (k,), "dp") for k in ("all_gather", "reduce_scatter", "all_reduce")]
    assert sent == pytest.approx([n * MODEL.parameters for n in (gathered, scattered, summed)])


def test_weights_that_stay_gathered_are_sent_once_a_step():
    layout = Layout(dp=8, sharding="full", micro=4)
    again, once = (sample(MODEL, layout, Stack(gathered_once=known)) for known in (False, True))
    assert again.less.looped[again.less.message > 0].all()
    assert not once.less.looped[once.less.message > 0].any()


def test_the_step_waits_for_messages_of_gradients_before_the_optimizer():
    work = sample(MODEL, Layout(dp=8), Stack()).less
    messages = np.flatnonzero(work.message > 0)
    optimizer = np.flatnonzero(work.phase == 2)[0]
    assert (messages + work.until[messages] == optimizer).all()


def test_what_is_before_the_layers_is_marked():
    found = sample(MODEL, Layout(dp=2), Stack())
    assert 0 < found.less.first.sum() == found.more.first.sum()
    assert found.before == Memory(2 * MODEL.table_parameters, 4 * MODEL.table_parameters, 12 * MODEL.table_parameters)


shardings = st.sampled_from(["none", "states", "gradients", "full"])
levels = st.sampled_from(["none", "attention", "operators", "full"])


@given(st.sampled_from([1, 2, 4, 8, 64]), shardings, levels)
def test_more_devices_in_dp_never_need_more_memory_each(dp, sharding, level):
    few = memory(Layout(dp=dp, sharding=sharding, recompute=level))
    many = memory(Layout(dp=2 * dp, sharding=sharding, recompute=level))
    buffers = 0 if dp > 1 else few.buffers + many.buffers  # what is gathered is held only where it is shared
    assert many.total - buffers <= few.total


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 4]), st.integers(1, 8), levels)
def test_larger_micro_batches_need_more_memory_and_recomputation_needs_less_activations(tp, pp, samples, level):
    layout = Layout(tp=tp, pp=pp, samples=samples, micro=4, recompute=level)
    assert memory(replace(layout, samples=samples + 1)).total > memory(layout).total
    assert memory(layout).activations <= memory(replace(layout, recompute="none")).activations
