"""Which plans there are to choose from: all that could be, and none that could not."""

import pytest

from moai.plan.options import Options
from moai.plan.plan import Plan
from moai.plan.space import Allowed, layouts, plans, variants


def laid_out(n_devices: int, batch: int, layers: int | None = None) -> set[tuple[int, int, int, int]]:
    return {(p.dp, p.tp, p.pp, p.micro) for p in layouts(n_devices, batch, None, layers)}


def test_every_layout_uses_all_devices_and_gives_each_micro_batch_of_each_a_sample_or_more():
    for dp, tp, pp, micro in laid_out(12, 24):
        assert dp * tp * pp == 12
        assert 24 % (dp * micro) == 0


def test_a_batch_that_cannot_be_cut_evenly_is_laid_out_without_micro_batches():
    assert {each for each in laid_out(4, 7) if each[0] == 4} == {(4, 1, 1, 1)}


def test_no_more_devices_share_a_batch_than_it_has_samples():
    assert max(dp for dp, *_ in laid_out(8, 2)) == 2


def test_a_step_without_samples_is_done_by_every_device():
    assert (3, 1, 1, 1) in laid_out(3, 0)


def test_a_pipeline_has_as_many_micro_batches_as_stages_or_more():
    stages = {(pp, micro) for *_, pp, micro in laid_out(8, 64) if pp > 1}
    assert stages and all(micro >= pp for pp, micro in stages)


@pytest.mark.parametrize(("layers", "most"), [(None, 16), (16, 16), (12, 8), (3, 2), (1, 1), (0, 1)])
def test_a_stage_has_a_layer_or_more_where_their_number_is_known(layers, most):
    assert max(pp for _, _, pp, _ in laid_out(16, 64, layers)) == most
    assert {each for each in laid_out(16, 64) if each[2] <= most} == laid_out(16, 64, layers)


def test_states_are_spread_over_devices_that_share_the_batch_alone():
    assert all(not plan.distribute_param for plan in variants(Plan(tp=4)))
    assert any(plan.distribute_low_prec_param for plan in variants(Plan(dp=4)))


def test_what_is_computed_with_is_spread_only_with_what_is_stored():
    assert all(plan.distribute_param or not plan.distribute_low_prec_param for plan in plans(8, 16))


def test_a_variant_keeps_no_more_than_the_one_before_it_that_spreads_alike():
    levels = ["none", "default", "full"]
    for spread in {(p.distribute_param, p.distribute_low_prec_param) for p in variants(Plan(dp=2))}:
        found = [p for p in variants(Plan(dp=2)) if (p.distribute_param, p.distribute_low_prec_param) == spread]
        assert [p.recompute for p in found] == levels


def test_no_plan_is_listed_twice():
    found = list(plans(16, 32))
    assert len(found) == len(set(found))


@pytest.mark.parametrize(
    ("allowed", "plan", "expected"),
    [
        (Allowed(), Plan(dp=2, tp=2, pp=2, micro=2), True),
        (Allowed(tp=2), Plan(tp=4), False),
        (Allowed(tp=2), Plan(tp=2), True),
        (Allowed(micro=4), Plan(micro=2), False),
        (Allowed(recompute=("default", "full")), Plan(), False),
        (Allowed(distribute_param=False), Plan(dp=2, distribute_param=True), False),
        (Allowed(most_stages=4), Plan(pp=2, micro=2), True),
        (Allowed(most_stages=4), Plan(pp=8, micro=8), False),
    ],
)
def test_a_plan_is_allowed_if_all_that_is_restricted_is_so(allowed, plan, expected):
    assert allowed.allows(plan) is expected


def test_what_a_script_leaves_open_is_allowed():
    assert Allowed.by(Options()) == Allowed(most_stages=Allowed.by(Options()).most_stages)


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"num_micro_batches": 4}, {"micro": 4}),
        ({"activation_recomputation": False}, {"recompute": ("none",)}),
        ({"activation_recomputation": True}, {"recompute": ("default", "full")}),
        ({"distribute_parameter": False}, {"distribute_param": False}),
        ({"pipeline_parallel": True, "num_stages": 4}, {"most_stages": 4}),
        ({"pipeline_parallel": False}, {"most_stages": 1}),
    ],
)
def test_a_scripts_options_restrict_what_is_allowed(options, allowed):
    found = Allowed.by(Options(**options))
    assert {name: getattr(found, name) for name in allowed} == allowed
