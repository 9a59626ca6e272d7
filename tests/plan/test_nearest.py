"""Which plan is nearest to one that cannot be."""

from dataclasses import replace

from hypothesis import given, settings

from moai.plan.nearest import lighter, nearest, obstacle
from moai.plan.plan import Plan
from tests.plan.plans import DEVICES, possible, wanted


@settings(deadline=None, max_examples=30)
@given(wanted, DEVICES)
def test_the_nearest_plan_is_possible_on_the_devices(plan, n_devices):
    found = nearest(plan, n_devices)
    assert found is not None
    assert obstacle(found, n_devices) is None


@settings(deadline=None, max_examples=30)
@given(possible())
def test_a_possible_plan_is_nearest_to_itself(plan):
    same = replace(plan, shard=None) if plan.shard == plan.dp else plan
    assert nearest(plan, plan.n_devices) == same


@settings(deadline=None, max_examples=30)
@given(wanted, DEVICES)
def test_numbers_are_not_changed_for_a_plan(plan, n_devices):
    assert nearest(plan, n_devices).precision == plan.precision


def test_one_key_is_changed_rather_than_two():
    assert nearest(Plan(dp=2, tp=3), 4) == Plan(dp=2, tp=2)


def test_the_closest_value_is_taken():
    assert nearest(Plan(dp=2, micro=8), 2, lambda plan: plan.micro <= 6) == Plan(dp=2, micro=6)
    assert nearest(Plan(dp=8, micro=2), 8, lambda plan: plan.tp >= 4).tp == 4


def test_what_the_graph_allows_is_asked_for_possible_plans_only_and_nearest_first():
    asked = []
    assert nearest(Plan(dp=4, micro=4), 4, lambda plan: asked.append(plan)) is None
    assert asked[0] == Plan(dp=4, micro=4)
    assert len(asked) == len(set(asked))
    assert all(obstacle(plan, 4) is None for plan in asked)


def test_a_subgroup_of_states_stays_what_it_is_if_dp_changes():
    plan = Plan(dp=6, distribute_param=True, shard=4)
    assert nearest(plan, 8) == Plan(dp=8, distribute_param=True, shard=4)


def test_hundreds_of_devices_are_searched():
    assert nearest(Plan(dp=256, tp=4), 512) == Plan(dp=256, tp=2)


@settings(deadline=None, max_examples=30)
@given(possible())
def test_lighter_plans_are_possible_on_the_same_devices_and_are_others(plan):
    found = list(lighter(plan))
    assert plan not in found
    assert len(found) == len(set(found))
    assert all(obstacle(other, plan.n_devices) is None for other in found)


def test_lighter_plans_distribute_recompute_and_cut_the_batch():
    found = list(lighter(Plan(dp=2)))
    assert set(found[:3]) == {
        Plan(dp=2, distribute_param=True),
        Plan(dp=2, recompute="full"),
        Plan(dp=2, micro=2),
    }
    assert found[-1] == Plan(2, micro=4, recompute="full", distribute_param=True, distribute_low_prec_param=True)


def test_one_device_has_nobody_to_distribute_to():
    assert not any(plan.distribute_param for plan in lighter(Plan()))
